"""OpenVLA-OFT's architecture at miniature size, with the published checkpoint's tensor names.

images of two cameras [B, 2, 3, size, size], prompt ids, state -> actions [B, chunk, 7], about -1..1
"""

import torch
import torch.nn.functional as F
from torch import nn

from model import N_ACTION, Llama, Projector, VisionBackbone

CHUNK = 8
N_STATE = 8
N_CAMERA = 2
STOP = 2  # </s>


class Residual(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.ffn = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.ReLU())

    def forward(self, x):
        return x + self.ffn(x)


class MlpResNet(nn.Module):
    def __init__(self, n_in, dim, n_out):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(n_in)
        self.fc1 = nn.Linear(n_in, dim)
        self.mlp_resnet_blocks = nn.ModuleList(Residual(dim) for _ in range(2))
        self.layer_norm2 = nn.LayerNorm(dim)
        self.fc2 = nn.Linear(dim, n_out)

    def forward(self, x):
        x = F.relu(self.fc1(self.layer_norm1(x)))
        for block in self.mlp_resnet_blocks:
            x = block(x)
        return self.fc2(self.layer_norm2(x))


class L1Head(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.model = MlpResNet(N_ACTION * dim, dim, N_ACTION)

    def forward(self, hidden):
        """Hidden states [B, chunk * 7, dim], those of each time step side by side."""
        return self.model(hidden.reshape(len(hidden), CHUNK, -1))


class StateProjector(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.fc1 = nn.Linear(N_STATE, dim)
        self.fc2 = nn.Linear(dim, dim)

    def forward(self, state):
        return self.fc2(F.gelu(self.fc1(state)))


class OpenVlaOft(nn.Module):
    def __init__(self, s):
        super().__init__()
        self.vision_backbone = VisionBackbone(s)
        self.projector = Projector(2 * s.tower, s.llama)
        self.language_model = Llama(s)
        self.action_head = L1Head(s.llama)
        self.proprio_projector = StateProjector(s.llama)

    def see(self, image):
        """The soft tokens of one picture each, [B, n_patch, dim]."""
        return self.projector(self.vision_backbone(image))

    def forward(self, soft, state, ids):
        """soft: those of all cameras, one after the other; ids: prompts of one length, [B, n]: nothing
        is padded, for nothing is masked. Returns actions, and the hidden states of all places after
        the first layer."""
        embed, n = self.language_model.model.embed_tokens, ids.shape[1]
        text = embed(ids)
        rows = [text[:, :1], soft, self.proprio_projector(state)[:, None], text[:, 1:]]
        placeholders = torch.zeros(len(ids), CHUNK * N_ACTION, text.shape[2])
        stop = embed(torch.full((len(ids), 1), STOP))
        # The first is the prompt's last row, and the last placeholder is not read.
        at = soft.shape[1] + n + torch.arange(CHUNK * N_ACTION).expand(len(ids), -1)
        hidden, first = self.language_model.model(torch.cat([*rows, placeholders, stop], 1), at)
        return self.action_head(hidden), first
