"""The judge of photographs by words: a small ResNet, trained on the true photographs and their
classes and on nothing else, says what an image shows.

    python -m lab.photo_judge --data=data/cifar10-50k --out=out/photos
It learns from the photographs that the stages learn from, and prints the share of the held-out ones
whose class it names. lab.photos does the same where there is no judge yet."""
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from common.files import file_sha256, save_tensors
from common.images import crop, to_tensor
from common.optim import Muon, set_learning_rate
from common.options import check_range, fail, parse_options
from common.process import run_main
from common.progress import Progress
from common.runtime import Runtime, format_size
from common.sources import ImageSource, split_names
from lab.cifar import read_labels
from lab.metrics import downscale, in_batches, proportion

SIDE = 32  # pixels that the judge looks at


@dataclass
class Config:
    data: str = "data/cifar10-50k"  # .tar of photographs and .tsv of their classes: see lab.cifar
    out: str = "out/photos"         # judge.pt
    val_percent: float = 2.0        # as in vqgan.py and prepare.py
    max_steps: int = 2400           # training steps
    batch_size: int = 256           # photographs a step
    learning_rate: float = 1e-2     # peak; warm-up, then cosine
    warmup: int = 100               # steps of linear warm-up
    device: str = "auto"            # auto, cpu, cuda, cuda:1, mps
    dtype: str = "auto"             # of autocast: auto, float32, bfloat16, float16


@dataclass
class Photos:
    """Photographs, uint8 (N, 32, 32, 3), and the numbers (N,) of their classes."""
    classes: list
    train: np.ndarray
    train_labels: np.ndarray
    heldout: np.ndarray
    heldout_labels: np.ndarray
    sha256: str                     # of photographs and classes


def read_photos(data, val_percent=2.0):
    """data.tar and data.tsv, in the splits that the stages make."""
    labels, source = read_labels(data), ImageSource(f"{data}.tar")
    classes, arrays = sorted({labels[name] for name in source.names if name in labels}), []
    for names in split_names(source, val_percent):
        names = [name for name in names if name in labels]
        if not names:
            fail(f"{data}.tsv has no class of the photographs in {data}.tar, or of none of the "
                 f"held-out ones; its paths must be like {source.names[0]}")
        try:
            arrays.append(np.stack([crop(source.open(name), SIDE) for name in names]))
        except (OSError, ValueError) as e:
            fail(f"a photograph of {data}.tar can't be read ({e}); make the file again")
        arrays.append(np.array([classes.index(labels[name]) for name in names]))
    return Photos(classes, *arrays, source.sha256 + file_sha256(f"{data}.tsv"))


class Residual(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.body = nn.Sequential(*convolution(width, width), *convolution(width, width)[:-1])

    def forward(self, x):
        return F.relu(x + self.body(x))


def convolution(c_in, c_out, size=3, stride=1):
    return [nn.Conv2d(c_in, c_out, size, stride, 1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU()]


class PhotoJudge(nn.Module):
    """A small ResNet: images (B, 3, S, S) in [0, 1] -> logits (B, classes)."""

    def __init__(self, classes):
        super().__init__()
        self.body = nn.Sequential(
            *convolution(3, 48, 4, 2), Residual(48),                   # 16 x 16
            *convolution(48, 96, 3, 2), Residual(96),                  # 8 x 8
            *convolution(96, 128, 3, 2), Residual(128))                # 4 x 4
        self.head = nn.Linear(128, classes)

    def features(self, x):
        x = downscale(x, SIDE).contiguous(memory_format=torch.channels_last)
        return self.body(x * 4 - 2).mean((2, 3)).float()                       # (B, 128)

    def forward(self, x):
        return self.head(self.features(x))


def augment(images, rng):
    """Photographs (B, S, S, 3) shifted by up to 4 pixels, mirrored at their edges, half of them
    flipped."""
    n, side = images.shape[:2]
    where = np.arange(side) + rng.integers(-4, 5, (2, n, 1))                   # (2, B, S)
    y, x = side - 1 - abs(side - 1 - abs(where))
    x = np.where(rng.random((n, 1)) < 0.5, x[:, ::-1], x)
    return images[np.arange(n)[:, None, None], y[:, :, None], x[:, None]]


def train_judge(photos, cfg, runtime):
    if runtime.dtype == torch.float16:
        runtime.dtype = torch.float32  # small enough to do without, and so without a scaler
    torch.manual_seed(0)
    judge = PhotoJudge(len(photos.classes)).to(runtime.device, memory_format=torch.channels_last)
    params = list(judge.parameters())
    optimizers = [Muon([p for p in params if p.dim() == 4]),
                  torch.optim.AdamW([p for p in params if p.dim() < 4], 0.0, weight_decay=0.05)]
    labels = torch.from_numpy(photos.train_labels).to(runtime.device)          # (N,)
    progress, order, rows = Progress(cfg.max_steps), [], np.arange(cfg.batch_size)
    runtime.print0(f"judge: {format_size(judge)}, {len(labels)} photographs, {cfg.max_steps} steps "
                   f"of {cfg.batch_size} on {runtime}")
    for step in range(cfg.max_steps):
        set_learning_rate(optimizers, step, cfg)
        epoch, index = np.divmod(step * cfg.batch_size + rows, len(labels))
        while len(order) <= epoch[-1]:
            order.append(np.random.default_rng((0, len(order))).permutation(len(labels)))
        index = np.array([order[e][i] for e, i in zip(epoch, index)])          # (B,)
        images = augment(photos.train[index], np.random.default_rng((1, step)))
        with runtime.autocast():
            logits = judge(to_tensor(images, runtime.device))                  # (B, classes)
        loss = F.cross_entropy(logits.float(), labels[index], label_smoothing=0.1)
        judge.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        progress(loss=loss.item())
    return judge


def get_judge(photos, cfg, runtime):
    """The judge of these photographs: out/judge.pt if it was trained on them by these options, else
    a new one."""
    path, judge = Path(cfg.out, "judge.pt"), PhotoJudge(len(photos.classes)).to(runtime.device)
    options = ("val_percent", "max_steps", "batch_size", "learning_rate", "warmup")
    about = {"photos": photos.sha256} | {name: getattr(cfg, name) for name in options}
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if saved["about"] == about:
            judge.load_state_dict(saved["judge"])
            return judge.eval()
        runtime.print0(f"{path} is the judge of other photographs, or of other options")
    except FileNotFoundError:
        pass
    except Exception as e:  # damaged files raise many kinds
        runtime.print0(f"{path} can't be read ({type(e).__name__})")
    judge = train_judge(photos, cfg, runtime)
    save_tensors(path, {"judge": judge.state_dict(), "about": about})
    return judge.eval()


def look(judge, images, runtime):
    """Images -> what the judge's head is given (N, 128), and the class that it sees (N,)."""
    with torch.no_grad():
        features = in_batches(lambda x: judge.features(x.to(runtime.device)), images)
        classes = judge.head(features).argmax(1)
    return features.cpu().double().numpy(), classes.cpu().numpy()


def main():
    cfg = parse_options(Config)
    check_range(cfg, 1, 2 ** 62, "max_steps", "batch_size")
    photos, runtime = read_photos(cfg.data, cfg.val_percent), Runtime(cfg.device, cfg.dtype)
    judge = get_judge(photos, cfg, runtime)
    classes = look(judge, photos.heldout, runtime)[1]
    hits = proportion((classes == photos.heldout_labels).tolist())
    runtime.print0("the judge {out}/judge.pt names {share:.1%} ({low:.1%}–{high:.1%}) of {n} "
                   "held-out photographs".format(out=cfg.out, **hits))
    return 0


if __name__ == "__main__":
    run_main(main)
