"""How `resnet_fast.fusion.api` sees what can run fused, and how it makes it so.

sandbox: a copy on which a forward may run. dataflow: what the forward calls. match: blocks and
chains in it. swap: the classes that modules get. survey: a whole model.
"""
