"""What a teacher marks in pictures is learned pixel by pixel, from soft masks that are stored in eight bits."""

import torch.nn.functional as F
from torch import Tensor

from limbeck.core.card import method, require
from limbeck.core.maths import upcast


@method(
    paper="Petit et al. 2024, section 3",
    year=2024,
    arxiv="2409.07566",
    code="GregoirePetit/EchoDFKD@b62e537:core/produce_targets.py",
    differs="the loss is that of the code's submodule, ConvLSTM-Segmentation@595935a:models.py",
)
def echodfkd(student_logits: Tensor, teacher_logits: Tensor, *, levels: int = 255) -> Tensor:
    """Mean over the last dimension of -m log sigmoid(student) - (1 - m) log sigmoid(-student), where the mask
    m = floor(levels sigmoid(teacher)) / levels is what a byte keeps of the teacher's.  [..., C] x 2 -> [...]

    levels: >= 2; 255 fills a byte. A mask loses less than 1 / levels.

    *Needs*: a yes or no for every place, such as logits of masks [B, 1, H, W]; no labels.
    *Relates to*: `bce` takes the masks of people; use this on pictures that a generator made, which nobody has marked.
    """
    require(levels >= 2, "levels", levels, ">= 2")
    z, mask = upcast(student_logits), (levels * upcast(teacher_logits.detach()).sigmoid()).floor() / levels
    return F.binary_cross_entropy_with_logits(z, mask.to(z.dtype), reduction="none").mean(-1)
