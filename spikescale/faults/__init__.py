"""Training that survives: signals, restarts, hangs, numbers that are no numbers, neurons that fall silent.

One idea a file. The training loop holds a `guard.Guard`, which watches the process, and an
`anomalies.Judge`, which watches the loss; `supervisor` starts the ranks of one machine again when they fail.
What each of them does, and the exit codes, stand in docs/faults.md.
"""
