"""The scaling-law lab: plan a ladder of runs, run it, fit the law, forecast, report."""
