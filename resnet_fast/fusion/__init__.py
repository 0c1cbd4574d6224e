"""How `resnet_fast.fuse` sees what can run fused, and how it makes it so.

dataflow: what a forward pass calls. match: blocks and chains in it. survey: a whole model. swap:
the classes that modules get.
"""
