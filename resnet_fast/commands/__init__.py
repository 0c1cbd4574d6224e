"""The commands of `resnet-fast`, one per file."""
