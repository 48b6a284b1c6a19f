"""The rows of lab/evaluate.py's table: which images are judged, one function for each kind."""
import itertools
import time
from pathlib import Path

import numpy as np

from common.progress import Progress
from lab.baselines import vqgan_clip_baseline
from lab.metrics import clip_embeddings, frechet_win_rate, ratio
from lab.painter import make_painter, shift, shifted_text_mean, with_shifted_text_mean
from lab.table import save_chart
from toy import BACKGROUNDS, SIZES, UNSEEN

SAMPLES = "samples of the prompts, N=1"  # the row that counts
SWEEPS = {  # option: (what it is, values of the plot)
    "guidance": ("classifier-free guidance", (1.0, 1.5, 2.0, 3.0, 4.0, 6.0)),
    "variety": ("noise of the conditions when sampling, in spreads",
                (0.0, 0.25, 0.5, 0.75, 1.0, 1.5))}


def add_true_images(table, painter):
    """True images: what there is to reach; and how near CLIP finds them to their captions."""
    data = table.data
    if table.judge:
        captions = table.clip.encode_text([row["caption"] for row in data.heldout_rows[:500]])
        cosines = (clip_embeddings(table.clip, data.heldout[:500]) * captions).sum(1)
        table.runtime.print0(f"cosine of {len(captions)} held-out drawings to their own captions: "
                             f"{cosines.mean().item():.3f}")
    table.add("true training images", data.train[:4000], data.train_rows, [0])  # the Frechet floor
    table.add("true held-out images", data.heldout, data.heldout_rows, data.groups)
    table.add("their reconstructions", painter.reconstruct(data.heldout), data.heldout_rows,
              data.groups)


def add_samples(table, painter, options):
    """Samples of the prompts, and of held-out images' embeddings. Returns the former."""
    data, n, texts = table.data, table.n, table.texts
    images = table.add_samples(SAMPLES, painter, texts, options)
    scores = (clip_embeddings(table.clip, images) * texts.repeat_interleave(n, 0)).sum(1)
    best = scores.view(-1, n).argmax(1).cpu().numpy() + np.arange(len(texts)) * n
    table.add(f"the same, best of {n} by CLIP", images[best], data.wanted, data.prompts,
              range(len(texts)))
    if options["variety"]:
        table.add_samples("samples at variety 0", painter, texts, options | {"variety": 0.0})
    if table.judge:
        add_toy_samples(table, painter, options)
    given = data.heldout[:len(texts) * n]
    keys = map(str, range(len(given)))
    drawn = painter(clip_embeddings(table.clip, given), keys, 1, options, "image")
    table.add("sampled from held-out images' embeddings", drawn, data.heldout_rows,
              list(data.groups)[:len(given)])
    return images


def add_toy_samples(table, painter, options):
    """Samples of the pairs that neither VQGAN nor GPT was shown, and of prompts that say more."""
    wanted, prompts, n = table.data.wanted, table.data.prompts, table.n
    unseen = [i for i, w in enumerate(wanted) if (w["colour"], w["object"]) in UNSEEN]
    images = painter(table.texts[unseen], [prompts[i] for i in unseen], 4 * n, options)
    own = np.repeat(unseen, 4 * n)
    table.add("samples of the unseen pairs alone, N=1", images, [wanted[i] for i in own],
              [prompts[i] for i in own], own)
    longer = [w | {"background": list(BACKGROUNDS)[i % 4], "size": list(SIZES)[i % 3]}
              for i, w in enumerate(wanted)]
    prompts = ["a {size} {colour} {object} on a {background} background".format(**w)
               .replace("medium ", "") for w in longer]
    images = painter(table.clip.encode_text(prompts), prompts, n, options)
    table.add("samples of prompts with size and background, N=1", images,
              [longer[i] for i in table.own], [prompts[i] for i in table.own])


def add_gap(table, painter, options, gap):
    """Samples of texts that are moved by a constant vector, by a GPT that expects them there.
    Returns (that painter, the row's name)."""
    data, name = table.data, f"samples, text embeddings moved by {gap:g}"
    images = data.train  # what the dump was made of
    if data.train_rows:
        images = images[[row["split"] == "train" for row in data.train_rows]]
    mean = shifted_text_mean(table.clip, gap, images[:2000])
    painter = with_shifted_text_mean(painter, mean)
    table.add_samples(name, painter, shift(table.texts, gap), options)
    return painter, name


def add_sweeps(table, painters, options, cfg):
    """Rows and charts of match against guidance and against variety, without and with the gap.
    painters: {gap: (painter, name of its row)}."""
    for option, (xlabel, values) in SWEEPS.items():
        lines = {}
        for gap, value in itertools.product(painters, values):
            painter, name = painters[gap]
            suffix = f", gap {gap:g}" if gap else ""
            if value != options[option]:
                name = f"samples at {option} {value:g}{suffix}"
            if name not in table.rows:
                table.add_samples(name, painter, shift(table.texts, gap),
                                  options | {option: value}, show=False)
            for key in ("both", "unseen") if table.judge else ("retrieval",):
                x = table.rows[name][key]
                line = lines.setdefault(f"{key}{suffix}, n={x['n']}", [])
                line.append((value, x["share"], x["low"], x["high"]))
        save_chart(Path(cfg.out, f"{option}.png"),
                   f"match against {option}, seed {cfg.seed}, 95% intervals", xlabel, lines)


def add_controls(table, controls, painter, options):
    """Samples by the same GPT trained otherwise, and what captions would have bought."""
    name = "control: the same GPT trained on {}"
    for what, (gpt, changes) in controls.items():
        other = make_painter(gpt, painter.vqgan, table.runtime, seed=painter.seed,
                             batch_size=painter.batch_size)
        table.add_samples(name.format(what), other, table.texts, options | changes)
    bought = ratio(table.rows[SAMPLES]["both"], table.rows[name.format("captions")]["both"])
    table.findings["language-free / captioned"] = bought
    table.sentences.append("Right object and colour, language-free / captioned: {ratio:.3f} "
                           "({low:.3f}–{high:.3f}).".format(**bought))


def choose_prompts(prompts, count):
    """The numbers of the prompts that optimisation draws too."""
    return np.random.default_rng(0).permutation(len(prompts))[:count]


def time_of_one(painter, text, options):
    """Seconds that one sample takes."""
    painter(text, ["warm-up"], 1, options)
    start = time.time()
    for i in range(10):
        painter(text, [str(i)], 1, options)
    return (time.time() - start) / 10


def add_optimised(table, painter, images, options, cfg):
    """Images optimised against CLIP in 10 and in 100 times the time of a sample, beside the first
    sample of the same prompts."""
    data, texts, runtime = table.data, table.texts, table.runtime
    chosen = choose_prompts(data.prompts, cfg.optimise)
    wanted, groups = data.wanted and [data.wanted[i] for i in chosen], list(chosen)
    seconds = time_of_one(painter, texts[:1], options)
    runtime.print0(f"optimisation takes {100 * seconds * len(chosen) / 60:.1f} minutes")

    def optimise(rows, *seconds):
        return vqgan_clip_baseline(painter.vqgan, table.clip, texts[rows], seconds,
                                   painter.gpt.cfg.grid, cfg.seed, runtime)
    if runtime.device.type == "cuda":  # loads kernels before the clock counts
        optimise(chosen[:8], 0.1)
    results, progress = [], Progress(len(chosen), unit="prompt optimised")
    for rows in np.array_split(chosen, -(-len(chosen) // 8)):
        results.append(optimise(rows, 10 * seconds, 100 * seconds))
        progress(len(rows))
    first = images[chosen * table.n]
    table.add(f"our first images of {len(chosen)} prompts, {seconds * 1e3:.0f} ms each", first,
              wanted, groups, chosen)
    for factor, optimised in zip((10, 100), map(np.concatenate, zip(*results))):
        name = f"those by optimisation against CLIP, {factor} times our time"
        table.add(name, optimised, wanted, groups, chosen)
        table.sheet[name] = np.zeros_like(images[::table.n])
        table.sheet[name][chosen] = optimised
        wins = frechet_win_rate(table.features(first), table.features(optimised), table.reference)
        table.findings[name] = {"frechet_win_rate": wins}
        table.sentences.append(
            f"Our Fréchet distance is smaller than that of {name} in {wins:.0%} of 40 resamplings "
            f"of the {len(chosen)} prompts.")
