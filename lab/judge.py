"""The judge of a toy world: a small classifier, trained on true drawings, half of them blurred, and
their attributes and on nothing else, says what an image shows; another tells how far a set of
images is from the drawings."""
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from common.checkpoints import load_gpt, load_named, load_vqgan
from common.files import save_tensors
from common.images import resize, to_tensor
from common.openai_clip import load_clip
from common.optim import learning_rate
from common.progress import Progress
from common.runtime import Runtime
from common.sampling import MODERN
from lab.metrics import clip_embeddings, downscale, frechet, in_batches, proportion
from lab.painter import make_painter, painter_for, with_gap
from lab.prompts import is_unseen, toy_prompts
from toy import BACKGROUNDS, COLOURS, OBJECTS, read_world

ATTRIBUTES = {"object": OBJECTS, "colour": tuple(COLOURS), "background": tuple(BACKGROUNDS)}


class Classifier(nn.Module):
    """A small convolutional network: images (B, 3, S, S) in [0, 1] -> logits of each attribute. It
    looks at 64 x 64 pixels."""

    def __init__(self):
        super().__init__()
        layers, c = [nn.Conv2d(3, 32, 4, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU()], 32
        for width, convs in ((32, 1), (64, 2), (128, 2)):
            for c_in in (c, width)[:convs]:
                layers += [nn.Conv2d(c_in, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
            layers.append(nn.MaxPool2d(2))
            c = width
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(c * 16, 256), nn.ReLU())
        self.heads = nn.ModuleDict({k: nn.Linear(256, len(v)) for k, v in ATTRIBUTES.items()})

    def features(self, x):
        return self.body(downscale(x, 64))                                     # (B, 256)

    def forward(self, x):
        h = self.features(x)
        return {name: head(h) for name, head in self.heads.items()}


class Judge(nn.Module):
    """Two classifiers. One has learnt blurred drawings too, so that blur does not hide from it what
    an image shows. By the features of the other, which has not, blurred drawings are far away."""

    def __init__(self):
        super().__init__()
        self.content, self.quality = Classifier(), Classifier()

    def features(self, x):
        return self.quality.features(x)                                        # (B, 256)

    def forward(self, x):
        return self.content(x)


def get_judge(data, out, images, rows, runtime, steps=300):
    """The judge of a toy world: out/judge.pt if that was trained on it and has these layers, else
    trained on its images and their rows of captions.tsv."""
    path, world = Path(out, "judge.pt"), Path(data, "world.json").read_text()
    judge = Judge().to(runtime.device)
    about = {"world": world, "steps": steps, "layers": str(judge)}
    if path.is_file():
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True)
            if all(saved.get(name) == value for name, value in about.items()):
                judge.load_state_dict(saved["judge"])
                return judge.eval()
        except Exception as e:  # damaged files raise many kinds
            runtime.print0(f"{path} can't be read ({type(e).__name__})")
    runtime.print0(f"training the judge on the true drawings of {data}, {steps} steps")
    judge = train_judge(steps, images, rows, runtime)
    save_tensors(path, {"judge": judge.state_dict()} | about)
    return judge.eval()


def train_judge(steps, images, rows, runtime):
    """A judge of drawings, of which its content classifier gets every second one shrunk, to 16 to
    48 pixels, and back."""
    torch.manual_seed(0)
    judge = Judge().to(runtime.device)
    adam = torch.optim.AdamW(judge.parameters(), 0.0, weight_decay=0.05)
    labels = {name: torch.tensor([values.index(row[name]) for row in rows])
              for name, values in ATTRIBUTES.items()}
    progress = Progress(steps)
    for step in range(steps):
        rng = np.random.default_rng((0, step))
        index = rng.integers(len(rows), size=128)
        adam.param_groups[0]["lr"] = learning_rate(step, 2e-3, 20, steps)
        sharp = to_tensor(images[index]).to(runtime.device)                    # (B, 3, S, S)
        small = downscale(sharp[1::2], rng.integers(16, 49))                   # (B/2, 3, s, s)
        mixed = sharp.clone()
        mixed[1::2] = resize(small, sharp.shape[-1]).clamp(0, 1)
        loss = sum(F.cross_entropy(logits[name], labels[name][index].to(runtime.device))
                   for logits in (judge.content(mixed), judge.quality(sharp)) for name in labels)
        adam.zero_grad()
        loss.backward()
        adam.step()
        progress(loss=loss.item())
    return judge


def judge_features(judge, images, runtime):
    """Images -> the judge's features (N, 256)."""
    features = in_batches(lambda x: judge.features(x.to(runtime.device)), images)
    return features.cpu().double().numpy()


def match(judge, images, wanted, runtime):
    """Shares of images in which the judge sees what is wanted, a dict of attributes for each: each
    attribute over the images that ask for it; "both", object and colour; "unseen", that for the
    pairs that neither VQGAN nor GPT was shown."""
    def classify(x):
        return torch.stack([row.argmax(1) for row in judge(x.to(runtime.device)).values()], 1)
    classes, right = in_batches(classify, images), {}                          # (N, attributes)
    for (name, values), column in zip(ATTRIBUTES.items(), classes.T.tolist()):
        right[name] = [values[i] == w[name] if name in w else None
                       for i, w in zip(column, wanted)]
    right["both"] = [o and c for o, c in zip(right["object"], right["colour"])]
    right["unseen"] = [both for both, w in zip(right["both"], wanted)
                       if is_unseen(w)]
    return {name: proportion([hit for hit in hits if hit is not None])
            for name, hits in right.items()}


class Examiner:
    """Judges what a GPT draws of a toy world's prompts, n images of each, on a CPU. The folder
    `models` holds the world's clip.pt and vqgan.pt, and the judge.pt that is trained if need be."""

    def __init__(self, data, models, n):
        self.n, self.runtime = n, Runtime("cpu", "float32", training=False)
        self.clip = load_clip(f"{models}/clip.pt")
        load_vqgan(f"{models}/vqgan.pt", "cpu")  # to know that it is there
        self.wanted, self.prompts = toy_prompts()
        heldout = read_world(data, "heldout")[0]
        images, rows = read_world(data, "train", "unseen")
        self.judge = get_judge(data, models, images, rows, self.runtime)
        self.reference = judge_features(self.judge, heldout, self.runtime)         # (M, 256)
        images = images[[row["split"] == "train" for row in rows]]
        self.image_embeds = clip_embeddings(self.clip, images)                     # (N, D)

    def __call__(self, path, changes, gap=0.0):
        """Figures of the GPT in a file, at guidance 3 (classic: 1) but for `changes` to the options
        of sample.py, each text moved by its own vector of length `gap`: shares of right object and
        colour, of all pairs ("both") and of the unseen ones; Frechet distance to the held-out
        images."""
        gpt, meta = load_gpt(path, "cpu")
        vqgan = load_named(lambda file: load_vqgan(file, "cpu"), path.parent, meta["vqgan"],
                           meta["vqgan_sha256"], path)
        classic = {"guidance": 1.0, "variety": 0.0} if gpt.cfg.classic else {}
        options = MODERN | classic | changes
        painter, clip = make_painter(gpt, vqgan, self.runtime), with_gap(self.clip, gap)
        if gap:
            painter = painter_for(painter, clip, self.image_embeds)
        images = painter(clip.encode_text(self.prompts), self.prompts, self.n, options)
        wanted = [w for w in self.wanted for _ in range(self.n)]
        right = match(self.judge, images, wanted, self.runtime)
        distance = frechet(judge_features(self.judge, images, self.runtime), self.reference)
        return {"both": right["both"]["share"], "unseen": right["unseen"]["share"],
                "frechet": distance}
