"""What the student says, and what it sees on the way, need only go up and down with the teacher's."""

from torch import Tensor, nn

from limbeck.core.card import method, require
from limbeck.core.features import Shape, common, same_places, tokens, width
from limbeck.core.layerwise import picked
from limbeck.core.maths import pair
from limbeck.core.project import projector
from limbeck.core.ranges import at_least
from limbeck.core.reduce import mean
from limbeck.core.responses import column_correlation, row_correlation, rows


@method(
    paper="Huang et al. 2025, DIST+: Knowledge Distillation From a Stronger Adaptive Teacher, TPAMI",
    year=2025,
    code="yoshitomo-matsubara/torchdistill@3e4373c:torchdistill/losses/mid_level.py",
    differs="the code is a third party's, the authors' is not out. It adds the mean correlation of the channels, which "
    "training then lowers; here 1 - rho, as everywhere else. Features of other widths or sizes are brought over by a "
    "linear projector and by averaging places; the teacher's acclimation to the student is left out",
)
class DISTPlus(nn.Module):
    """DIST of the logits + channel_weight (1 - rho over the channels) + spatial_weight (1 - rho over the batch).  -> []

    Responses: T^2 (beta mean_i (1 - rho(s_i, t_i)) + gamma mean_c (1 - rho(s_:c, t_:c))) of the probabilities s, t, as
    in `dist`. One pair of features [B, D, H, W], tokens [B, T, D] or vectors [B, D]: at every place of every example,
    rho of the two vectors of channels; and for every place, rho along the batch of the sums of the channels.

    beta: weight of the classes of an example, >= 0.
    gamma: weight of the examples of a class, >= 0.
    channel_weight: weight of the channels at a place, >= 0.
    spatial_weight: weight of the sums at a place, >= 0.
    temperature: T > 0 of the probabilities.
    layer: which of the features, from shallow (0) or from deep (-1).

    *Needs*: logits over the same classes and a feature of each, usually the last stage; a batch of several examples; no
        labels. Masked examples are left out.
    *Relates to*: add `ce` at weight 1, this at 2 (with beta = gamma = 2 and both others 1 on ImageNet). `dist` when
        there are logits alone.
    """

    def __init__(
        self,
        student_feats: list[Shape],
        teacher_feats: list[Shape],
        *,
        beta: float = 1.0,
        gamma: float = 1.0,
        channel_weight: float = 1.0,
        spatial_weight: float = 1.0,
        temperature: float = 1.0,
        layer: int = -1,
    ) -> None:
        super().__init__()
        at_least(0, beta=beta, gamma=gamma, channel_weight=channel_weight, spatial_weight=spatial_weight)
        require(temperature > 0, "temperature", temperature, "> 0")
        self.beta, self.gamma, self.temperature, self.layer = beta, gamma, temperature, layer
        self.channel_weight, self.spatial_weight = channel_weight, spatial_weight
        narrow, wide = map(width, common(*picked(student_feats, teacher_feats, layer)))
        self.projector = nn.Identity() if narrow == wide else projector("linear", narrow, wide)

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        student_feats: list[Tensor],
        teacher_feats: list[Tensor],
        mask: Tensor | None = None,
    ) -> Tensor:
        """One value for the batch."""
        (s, counts), (t, _) = rows(student_logits, mask), rows(teacher_logits.detach(), mask)
        s, t = (s / self.temperature).softmax(-1), (t / self.temperature).softmax(-1)
        inter = mean(1 - row_correlation(s, t), counts).value
        intra = (1 - column_correlation(s, t, counts)).mean()
        f_s, f_t = same_places(student_feats[self.layer], teacher_feats[self.layer].detach())
        f_s, f_t = pair(tokens(self.projector(f_s)), tokens(f_t))
        channel = mean(1 - row_correlation(f_s, f_t), mask).value
        spatial = (1 - column_correlation(f_s.sum(-1), f_t.sum(-1), counts)).mean()
        responses = self.temperature**2 * (self.beta * inter + self.gamma * intra)
        return responses + self.channel_weight * channel + self.spatial_weight * spatial
