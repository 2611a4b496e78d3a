"""What the recorder cannot do with the models of the zoo, by name and with the reason.

A name here is an expected failure: the test fails once it passes, and the name is to be removed.
"""

FLATTENED = "layers see samples joined with positions"
POSITIONS = "a table of positions has no axis of samples"
OWN_BACKWARD = "a custom function that cannot be mapped over samples"
TWO_OWNERS = "a bias is owned by two modules"
FUNCTIONAL = "a functional call uses the weight of a layer"

# Both in a comparison of rows and in training.
REFUSED: dict[str, str] = {
    "sequence-first": "the samples are on axis 1",
    "own-parameters": "the parameters of the LightningModule itself act outside of layers",
    "own-backward": OWN_BACKWARD,
    "tied-autoencoder": "the network returns a loss, and uses a layer's weight itself",
    "simclr": "two views of each sample are in one batch",
    "opt": FLATTENED,
    "mixtral": FLATTENED,
    "qwen2-moe": FLATTENED,
    "olmoe": FLATTENED,
    "gpt-oss": FLATTENED,
    "deepseek-v3": FLATTENED,
    "jamba": FLATTENED,
    "qwen3-next": FLATTENED,
    "switch": "experts see some of the tokens",
    "swin": "layers see windows of several samples",
    "mamba": FUNCTIONAL,
    "mamba2": FUNCTIONAL,
    "falcon-mamba": FUNCTIONAL,
    "recurrent-gemma": OWN_BACKWARD,
    "xlnet": "the samples are on axis 1",
    "longformer": "the samples are on axis 1 in some layers",
    "bert-mlm": TWO_OWNERS,
    "blip": TWO_OWNERS,
    "deberta": POSITIONS,
    "perceiver": "the latents are looked up without an input",
    "t5": POSITIONS,
    "t5-gated": POSITIONS,
    "longt5": POSITIONS,
    "bart": POSITIONS,
    "clip": "the network returns a loss, and scales it by its own parameter",
    "vilt": "a module with its own parameters depends on its data's values",
}

# In training only.
REFUSED_TRAINING: dict[str, str] = {
    "gemma2": "the coordinates of a scaled embedding have another layout",
    "beit": "a module with its own parameters draws random numbers",
    "reformer": "reversible layers run twice",
}

# Some parameters are left out, in the comparison of rows too.
LEFT_OUT: dict[str, str] = {
    "funnel": "attention with dropout, although in evaluation mode",
    "reformer": "a list of parameters",
}
