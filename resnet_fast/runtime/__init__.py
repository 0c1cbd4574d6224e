"""What kernels and commands stand on: recording, tuning tables, settings, CPU, option types."""
