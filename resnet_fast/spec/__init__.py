"""What is computed: the equations, a block as data, dtypes, memory formats, allowed errors.

It imports only PyTorch; the rest of the package imports it.
"""
