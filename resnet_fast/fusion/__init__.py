"""How `fuse` and `explain` (`resnet_fast.fusion.api`) find what can run fused, and run it.

sandbox: a copy on which a forward may run. dataflow: the calls that the forward makes. match:
blocks and chains among them. swap: the classes of fused modules. survey: a whole model.
"""
