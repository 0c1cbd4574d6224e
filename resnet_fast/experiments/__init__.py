"""`resnet-fast experiment`: the experiments that made residual networks, one file each.

A module of an experiment has `add_arguments(parser)` and `run(args) -> Findings`: its claims and
whether they hold, a table, the figures behind it and a picture. `findings` prints and writes them.

    options    the command-line options that experiments share
    nets       nets by depth, and how they are run
    compare    nets trained by one recipe, side by side
    surgery    blocks taken out of a trained net, or exchanged
    findings   what an experiment gives back: text, JSON, PNG, page
"""

EXPERIMENTS = {
    "degradation": "deeper plain nets train worse, deeper residual nets do not",
    "gradient-flow": "how much of the gradient reaches the first layer, by depth",
    "preact": "post-activation against pre-activation blocks in a deep net",
    "shortcuts": "no shortcut, identity, zero-pad (A), projections (B, C)",
    "bottleneck": "parameters and speed of basic and bottleneck blocks at 50 layers",
    "activations": "what each stage makes of one image: maps and statistics",
    "lesion": "delete or exchange blocks of a trained net",
    "bugs": "blocks that are nearly right: ReLU before the addition, no normalization",
}
"""Name → what it shows. The module is the name with an underscore."""
