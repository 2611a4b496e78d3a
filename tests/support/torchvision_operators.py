"""A plugin of pytest: declare two operators that a torchvision for GPUs lacks under a CPU's torch.

Without them, its import fails, and with it that of torchmetrics and Lightning.
"""

import torch

LIBRARY = torch.library.Library("torchvision", "FRAGMENT")
for name in ("nms", "qnms"):
    if not hasattr(torch.ops.torchvision, name):
        LIBRARY.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
