"""Shared by kernels and commands: recording, tuning tables, settings, CPU, option types."""
