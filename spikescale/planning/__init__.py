"""What a run will need before it is started: parameters, bytes a rank, seconds a step, days and money.

Arithmetic alone: nothing here imports torch or DeepSpeed. `memory` follows what the model keeps for backward
and what DeepSpeed allocates, and is checked against real processes by `benchmarks/memory.py`.
"""
