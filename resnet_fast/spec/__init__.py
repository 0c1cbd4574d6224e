"""What is computed: the equations, a block as data, dtypes, memory formats, allowed errors.

Imports PyTorch alone; the rest of the package imports this.
"""
