"""`resnet-fast experiment`: the experiments behind residual networks, one file each.

The module of an experiment has `add_arguments(parser)` and `run(args) -> Findings`: claims and
whether they hold, a table, all numbers and a picture. `findings` prints and writes them.

    options    command-line options that experiments share
    exercise   the nets of `degradation --preset exercise`
    nets       nets by depth and implementation
    compare    train several nets by one recipe
    surgery    delete or exchange blocks of a trained net
    findings   the result of an experiment: text, JSON, PNG, page
"""

EXPERIMENTS = {
    "degradation": "deeper plain nets train worse; deeper residual nets do not",
    "gradient-flow": "norm of the gradient of every layer, by depth",
    "preact": "post-activation and pre-activation blocks in a deep net",
    "shortcuts": "no shortcut, identity, zero-pad (A), projections (B, C)",
    "bottleneck": "parameters and speed of basic and bottleneck blocks at 50 layers",
    "activations": "feature maps and statistics of every stage for one image",
    "lesion": "delete or exchange blocks of a trained net",
    "bugs": "two wrong blocks: ReLU before the addition, no normalization",
}
"""Name → summary. The module has an underscore for each hyphen of the name."""
