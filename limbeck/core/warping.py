"""Networks that change pictures, and through which gradients flow: what a method searches hard inputs with.

Each begins as the identity. `limits` bound what it may do.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NOISE = 8  # random numbers that a changer gets with each picture, so that it may do one thing or another


class Look(nn.Module):
    """A small summary of pictures with noise: [B, C, H, W] -> [B, width + NOISE]."""

    def __init__(self, channels: int, width: int = 32) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, width // 2, 3, 2, 1), nn.ReLU(), nn.Conv2d(width // 2, width, 3, 2, 1), nn.ReLU()
        )

    def forward(self, images: Tensor) -> Tensor:
        seen: Tensor = self.layers(images).mean((2, 3))
        return torch.cat([seen, torch.randn(len(images), NOISE, device=images.device, dtype=seen.dtype)], 1)


class Affine(nn.Module):
    """Moves, turns and scales each picture as a small network says (a spatial transformer): [B, C, H, W] -> the same.

    shift: largest move as a part of the side. turn: largest angle in radians. zoom: largest logarithm of the scale.
    What comes in from outside repeats the border.
    """

    def __init__(self, channels: int, shift: float = 0.25, turn: float = 0.5, zoom: float = 0.25) -> None:
        super().__init__()
        self.look, self.say = Look(channels), nn.Linear(32 + NOISE, 4)
        self.register_buffer("limits", torch.tensor([2 * shift, 2 * shift, turn, zoom]), persistent=False)
        nn.init.zeros_(self.say.weight)
        nn.init.zeros_(self.say.bias)

    limits: Tensor

    def forward(self, images: Tensor) -> Tensor:
        right, down, angle, zoom = (self.say(self.look(images)).tanh() * self.limits).float().unbind(1)
        cos, sin = zoom.exp() * angle.cos(), zoom.exp() * angle.sin()
        theta = torch.stack([torch.stack([cos, -sin, right], 1), torch.stack([sin, cos, down], 1)], 1)
        grid = F.affine_grid(theta.to(images.dtype), list(images.shape), align_corners=False)
        return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


class Autoencoder(nn.Module):
    """A small variational autoencoder of pictures [B, C, H, W] whose sides are multiples of 2.

    latent: numbers of a code.
    """

    def __init__(self, shape: tuple[int, int, int], latent: int = 16, width: int = 32) -> None:
        super().__init__()
        channels, height, side = shape
        inner = (width, height // 2, side // 2)
        flat = inner[0] * inner[1] * inner[2]
        self.latent = latent
        self.encode = nn.Sequential(
            nn.Conv2d(channels, width, 4, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(flat, 2 * latent)
        )
        self.decode = nn.Sequential(
            nn.Linear(latent, flat), nn.ReLU(), nn.Unflatten(1, inner), nn.ConvTranspose2d(width, channels, 4, 2, 1)
        )

    def code(self, images: Tensor) -> Tensor:
        """The mean of the code of each: [B, latent]."""
        mean: Tensor = self.encode(images).chunk(2, 1)[0]
        return mean

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Squared error of the picture from a drawn code, KL of the code's Gaussian to the standard one: [B] x 2."""
        mean, spread = self.encode(images).chunk(2, 1)
        spread = spread.clamp(-8, 8)
        drawn = mean + (0.5 * spread).exp() * torch.randn_like(mean)
        error = (self.decode(drawn) - images).square().flatten(1).sum(1)
        return error, 0.5 * (mean.square() + spread.exp() - 1 - spread).sum(1)


class Edit(nn.Module):
    """Moves the codes of pictures; what the decoder makes of the move is added: x + decode(z + d) - decode(z).

    reach: largest move of a number of the code, which is about 1 over pictures.
    """

    def __init__(self, latent: int, reach: float = 1.5, width: int = 64) -> None:
        super().__init__()
        self.reach = reach
        last = nn.Linear(width, latent)
        self.layers = nn.Sequential(nn.Linear(latent + NOISE, width), nn.ReLU(), last)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, images: Tensor, autoencoder: Autoencoder) -> Tensor:
        z = autoencoder.code(images)
        noise = torch.randn(len(z), NOISE, device=z.device, dtype=z.dtype)
        move = self.reach * self.layers(torch.cat([z, noise], 1)).tanh()
        both: Tensor = autoencoder.decode(torch.cat([z + move, z]))
        edited, plain = both.chunk(2)
        return images + (edited - plain)
