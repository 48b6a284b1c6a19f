"""The rows of lab/evaluate.py's table that need no other network: which images are judged, one
function for each kind."""
import itertools
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from lab.metrics import clip_embeddings
from lab.painter import move, painter_for, with_gap
from lab.table import save_chart

SAMPLES = "samples of the prompts, N=1"  # the row that counts
RETRIEVED = "the nearest training images by CLIP, no generator"
SWEEPS = {  # option: (what it is, values of the plot)
    "guidance": ("classifier-free guidance", (1.0, 1.5, 2.0, 3.0, 4.0, 6.0)),
    "variety": ("noise of the conditions when sampling, in spreads",
                (0.0, 0.25, 0.5, 0.75, 1.0, 1.5))}
SWEPT_GAP = 1.2  # beside no gap


def row_name(kind):
    """The row of our samples of a kind of prompts (lab/prompts.py)."""
    return SAMPLES if kind == "plain" else f"samples of {kind} prompts, N=1"


def add_true_images(table, painter):
    """True images: what there is to reach; and how near CLIP finds them to their captions."""
    data = table.data
    if table.judge:
        captions = table.clip.encode_text([row["caption"] for row in data.heldout_rows[:500]])
        cosines = (clip_embeddings(table.clip, data.heldout[:500]) * captions).sum(1)
        table.runtime.print0(f"cosine of {len(captions)} held-out drawings to their own captions: "
                             f"{cosines.mean().item():.3f}")
    table.add("true training images", data.train[:2000], data.train_rows, [0])
    table.add("true held-out images", data.heldout, data.heldout_rows, data.groups)
    side = data.heldout.shape[1] * 3 // 8
    table.add(f"the same, shrunk to {side} px and back", blur(data.heldout, side),
              data.heldout_rows, data.groups)
    table.add("their reconstructions", painter.reconstruct(data.heldout), data.heldout_rows,
              data.groups)


def blur(images, side):
    """Images, uint8 (N, S, S, 3), shrunk to side x side and back."""
    size = images.shape[1:3]
    small = [Image.fromarray(x).resize((side, side), Image.Resampling.BICUBIC) for x in images]
    return np.stack([np.asarray(x.resize(size, Image.Resampling.BICUBIC)) for x in small])


def add_samples(table, painter, options):
    """Samples of the prompts, of other kinds of prompts, and of held-out images' embeddings.
    Returns the first."""
    data, n, texts = table.data, table.n, table.texts
    images = table.add_samples(SAMPLES, painter, options)
    scores = (clip_embeddings(table.clip, images) * texts.repeat_interleave(n, 0)).sum(1)
    best = scores.view(-1, n).argmax(1).cpu().numpy() + np.arange(len(texts)) * n
    table.add(f"the same, best of {n} by CLIP", images[best], data.prompts.wanted,
              data.prompts.texts, range(len(texts)))
    if options["variety"]:
        table.add_samples("samples at variety 0", painter, options | {"variety": 0.0})
    for kind, prompts in data.kinds.items():
        table.add_samples(row_name(kind), painter, options, prompts)
    given = data.heldout[:len(texts) * n]
    keys = map(str, range(len(given)))
    drawn = painter(clip_embeddings(table.clip, given), keys, 1, options, "image")
    table.add("sampled from held-out images' embeddings", drawn, data.heldout_rows,
              list(data.groups)[:len(given)])
    return images


def add_retrieved(table):
    """No generator at all: of each prompt the n training images whose embeddings are nearest."""
    data, learnt = table.data, np.flatnonzero(table.data.is_learnt)
    n = min(table.n, len(learnt))
    index = (table.texts @ table.train_embeds.T).topk(n).indices.flatten().cpu().numpy()  # (P*n,)
    number = np.arange(len(data.prompts.texts)).repeat(n)
    images, wanted = data.train[learnt[index]], data.prompts.wanted
    table.add(RETRIEVED, images, wanted and [wanted[i] for i in number],
              [data.prompts.texts[i] for i in number], number)
    table.sheet[RETRIEVED] = images[::n]


def add_gaps(table, painter, options, lengths):
    """Samples of texts that are moved, each by its own vector of these lengths, by a GPT whose text
    mean is what prepare.py would find there. Returns {length: (painter, CLIP, name of the row)}."""
    found, prompts = {0.0: (painter, table.clip, SAMPLES)}, table.data.prompts.texts
    for length in lengths:
        if length and not painter.gpt.cfg.classic:
            clip, name = with_gap(table.clip, length), f"samples, each text moved by {length:g}"
            moved = painter_for(painter, clip, table.train_embeds)
            table.add_samples(name, moved, options, embeds=clip.encode_text(prompts))
            found[length] = moved, clip, name
    return found


def ceilings(table, lengths, draws=20):
    """What an observer who knows the prompts makes of texts that were moved: {"clean text" or
    "images' mean": [(length, share that is nearest to its own, low, high)]}; mean, lowest and
    highest of `draws` draws of the vectors. Images are known of the toy world alone."""
    texts, embeds, known = table.data.prompts.texts, table.texts, {"clean text": table.texts}
    means = image_means(table)                                                     # (P, D)
    if means is not None:
        known["images' mean"] = F.normalize(means - means.nanmean(0), dim=-1)
    center, found = table.texts.mean(0), {}
    for name, targets in known.items():
        is_known = ~targets.isnan().any(1)
        for length in lengths:
            moved = [move(embeds, texts, length, draw) - center * (name != "clean text")
                     for draw in range(draws)]
            own = torch.arange(len(texts), device=embeds.device)
            hits = [((x @ targets.nan_to_num().T).argmax(1) == own)[is_known].float().mean().item()
                    for x in moved]
            found.setdefault(name, []).append((length, float(np.mean(hits)), min(hits), max(hits)))
    return found


def image_means(table):
    """The mean embedding (P, D) of the training drawings that show each prompt's object and colour,
    nan where there is none; None where that is not known."""
    data = table.data
    if not data.prompts.wanted:
        return None
    embeds = clip_embeddings(table.clip, data.train)                               # (N, D)
    pairs = np.array([f"{row['colour']} {row['object']}" for row in data.train_rows])
    return torch.stack([embeds[torch.from_numpy(pairs == f"{w['colour']} {w['object']}")].mean(0)
                        for w in data.prompts.wanted])


def add_gap_chart(table, gaps, cfg):
    """Match against the length of the gap, and the two ceilings."""
    lines, limits = {}, ceilings(table, list(gaps))
    for key in ("both", "unseen") if table.judge else ("retrieval",):
        lines |= share_line(table, key, key, [(length, gap[2]) for length, gap in gaps.items()])
    for name, line in limits.items():
        lines[f"ceiling, {name}"] = line
        shares = ", ".join(f"{share:.1%} at {length:g}" for length, share, _, _ in line)
        table.sentences.append(f"Ceiling, a moved text being nearest to its own {name}: {shares}.")
    table.findings["ceilings"] = limits
    save_chart(Path(cfg.out, "moved.png"), f"match against the gap, seed {cfg.seed}, 95% intervals",
               "length of each text's own vector", lines)


def share_line(table, key, name, rows):
    """{name: points of save_chart} of the figure `key` in these rows [(x, name of the row)]."""
    figures = [(x, table.rows[row][key]) for x, row in rows if table.rows[row][key]]
    points = [(x, f["share"], f["low"], f["high"]) for x, f in figures]
    return {f"{name}, n={figures[0][1]['n']}": points} if points else {}


def add_sweeps(table, gaps, options, cfg):
    """Rows and charts of match against guidance and against variety, without and with a gap."""
    gaps = {length: gap for length, gap in gaps.items() if length in (0, SWEPT_GAP)}
    for option, (xlabel, values) in SWEEPS.items():
        lines, names = {}, {}
        for (length, (painter, clip, name)), value in itertools.product(gaps.items(), values):
            suffix = f", gap {length:g}" if length else ""
            if value != options[option]:
                name = f"samples at {option} {value:g}{suffix}"
            if name not in table.rows:
                table.add_samples(name, painter, options | {option: value}, show=False,
                                  embeds=clip.encode_text(table.data.prompts.texts))
            names.setdefault(suffix, []).append((value, name))
        for suffix, rows in names.items():
            for key in ("both", "unseen") if table.judge else ("retrieval",):
                lines |= share_line(table, key, f"{key}{suffix}", rows)
        save_chart(Path(cfg.out, f"{option}.png"),
                   f"match against {option}, seed {cfg.seed}, 95% intervals", xlabel, lines)
