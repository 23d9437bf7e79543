"""Question-answer pairs out of articles, for tuning a model on instructions."""
