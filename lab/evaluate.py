"""Stage 5: do images match the words, how good are they, and what would captions have bought?

On the toy world that can be known: a small classifier, trained on true drawings and their
attributes and on nothing else, says what an image shows. It judges true held-out drawings and their
reconstructions too, which is as well as any generator behind this VQGAN could do. On other data a
CLIP judges, better another one than the GPT was trained with (--judge). On the toy world texts are
also moved away from their images (--gap), the same GPT is trained twice more, on captions'
embeddings and on nothing, and others draw too: retrieval, and the paper's opponent, a search for
latents whose image CLIP likes. For the demo's GPT all of it takes an hour; --controls=False
--optimise=0 --plots=False leaves the samples' own rows. Options are chosen on prompts that are
reported nowhere: --prompt_set=choose."""
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
from PIL import Image

from common.checkpoints import load_gpt, newest
from common.files import atomic_write, write_json
from common.images import save_grid
from common.openai_clip import load_clip
from common.options import check_range, fail, parse_options
from common.process import run_main
from common.runtime import Runtime
from common.sources import ImageSource, center_crops, split_names
from lab import comparisons, rows
from lab.baselines import find_dump, train_controls
from lab.judge import get_judge
from lab.painter import make_painter
from lab.prompts import Prompts, choosing_prompts, reported_prompts
from lab.table import Table, find_doubts
from sample import format_options, load
from toy import read_world


@dataclass
class Config:
    data: str = "data/toy"           # the toy world, or any folder or .tar of images
    texts: str = ""                  # for other data than the toy world: prompts, one a line
    prompt_set: str = "report"       # of the toy world: report, or choose, to choose options by
    out: str = "out/toy"             # match.json, match.md, match.png, compare.png, plots, judge.pt
    gpt: str = ""                    # as in sample.py
    vqgan: str = ""                  # as in sample.py
    clip: str = ""                   # as in sample.py
    judge: str = ""                  # another CLIP to judge by (empty: the GPT's own, it flatters)
    trust_jit: bool = False          # as in sample.py
    n: int = 8                       # images a prompt; best-of-n chooses among them
    guidance: float | None = None    # as in sample.py
    temperature: float | None = None  # as in sample.py
    top_k: int | None = None         # as in sample.py
    top_p: float | None = None       # as in sample.py
    variety: float | None = None     # as in sample.py
    seed: int = 0                    # of the samples
    gap: tuple[float, ...] | None = None  # lengths that texts are moved by (auto: toy, 0.8 to 2.4)
    plots: bool | None = None        # match against gap, guidance and variety (auto: toy world)
    controls: bool | None = None     # train the GPT on captions and on nothing (auto: toy world)
    optimise: int | None = None      # prompts to optimise against CLIP (auto: toy world, 48)
    judge_steps: int = 300           # training steps of the judge
    min_match: float = 0.0           # exit with code 1 if fewer samples show object and colour
    batch_size: int = 96             # images at a time
    device: str = "auto"             # auto, cpu, cuda, cuda:1, mps
    dtype: str = "auto"              # as in sample.py


GAPS = (0.8, 1.2, 1.6, 2.4)


# ---------------------------------------------------------------------------------------- options


def check(cfg, is_toy):
    """Refuse options that make no sense, by themselves or together."""
    check_range(cfg, 1, 2 ** 62, "n", "judge_steps", "batch_size")
    check_range(cfg, 0, 1, "top_p", "min_match")
    check_range(cfg, 0, 1e6, "guidance", "temperature", "variety")
    if not is_toy and not cfg.texts:
        fail(f"{cfg.data} is no toy world (no captions.tsv); draw one with toy.py, or give "
             f"prompts, --texts=FILE")
    if is_toy and cfg.texts:
        fail("--texts is for other images than the toy world, whose prompts are its own; name "
             "them with --data")
    if cfg.controls and not is_toy:
        fail("--controls=True needs the toy world, which has captions")
    if cfg.prompt_set not in ("report", "choose"):
        fail(f"--prompt_set={cfg.prompt_set} makes no sense: it takes one of report, choose")
    if cfg.prompt_set == "choose" and not is_toy:
        fail("--prompt_set=choose is of the toy world; other prompts are those of --texts")
    if cfg.prompt_set == "choose" and (cfg.controls or cfg.optimise):
        fail("--prompt_set=choose is for choosing options: it goes without --controls and "
             "--optimise")
    if cfg.optimise == 1:
        fail("--optimise=1 is too few to compare; it takes 0 or from 2 prompts on")


def fill_in(cfg, is_toy, gpt, options):
    """What was left to auto, for this kind of data and GPT."""
    if cfg.plots and options["guidance"] == 1:
        fail("--plots=True needs a GPT trained with dropped conditions, and another --guidance "
             "than 1")
    if cfg.controls and gpt.cfg.classic:
        fail("--controls=True needs a GPT that is not classic, one that can do without its "
             "condition")
    plots = is_toy and options["guidance"] != 1 if cfg.plots is None else cfg.plots
    compares = is_toy and cfg.prompt_set == "report"
    controls = compares and not gpt.cfg.classic if cfg.controls is None else cfg.controls
    optimise = 48 * compares if cfg.optimise is None else cfg.optimise
    gap = GAPS * is_toy if cfg.gap is None else cfg.gap
    return replace(cfg, plots=plots, controls=controls, optimise=optimise, gap=gap)


# ------------------------------------------------------------------------------------------- data


@dataclass
class Data:
    """What samples are asked for, and the true images, uint8 (N, S, S, 3), to compare them with."""
    prompts: Prompts                 # those that the table is about
    train: np.ndarray                # what the networks were trained on, all or some of it
    is_learnt: np.ndarray            # whether the VQGAN and the GPT were, not the CLIP alone (N,)
    heldout: np.ndarray              # what they were not
    groups: list                     # of the held-out images: those of one kind
    kinds: dict = field(default_factory=dict)  # {name: other Prompts}
    # of toy worlds alone
    choosing: Prompts | None = None  # to choose options by
    train_rows: list | None = None   # rows of captions.tsv
    heldout_rows: list | None = None


def read_data(cfg, is_toy, image_size):
    """A toy world; or images of any folder and the prompts of --texts."""
    if is_toy:
        kinds, choosing = reported_prompts(), choosing_prompts()
        if cfg.prompt_set == "choose":
            kinds = {"plain": choosing}
        heldout, heldout_rows = read_world(cfg.data, "heldout")
        train, train_rows = read_world(cfg.data, "train", "unseen")
        is_learnt = np.array([row["split"] == "train" for row in train_rows])
        groups = [f"{r['colour']} {r['object']}" for r in heldout_rows]
        data = Data(kinds.pop("plain"), train, is_learnt, heldout, groups, kinds, choosing,
                    train_rows, heldout_rows)
    else:
        prompts, source = Prompts(read_prompts(cfg.texts)), ImageSource(cfg.data)
        train, heldout = (center_crops(source, names, image_size, 2000)
                          for names in split_names(source, 10.0))
        data = Data(prompts, train, np.ones(len(train), bool), heldout, list(range(len(heldout))))
    if min(len(data.train), len(data.heldout)) < 4:
        fail(f"{cfg.data} has {len(data.train)} + {len(data.heldout)} images that can be read, too "
             f"few to compare with")
    return data


def read_prompts(path):
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeError) as e:
        fail(f"{path} can't be read ({e}); --texts takes a text file, one prompt a line")
    # a duplicate prompt makes retrieval ambiguous
    prompts = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if len(prompts) < 2:
        fail(f"{path} holds {len(prompts)} prompts; two or more are needed, one a line")
    return prompts


# ------------------------------------------------------------------------------------------- main


def write_results(table, images, options, cfg):
    """match.json, match.md, match.png (all samples) and compare.png (a row for each kind)."""
    table.sentences.append(
        f"GPT {cfg.gpt}, seed {cfg.seed}; {format_options(options)}. Shares with Wilson's 95% "
        f"intervals, means ± 1.96 standard errors, Fréchet distances ± 1.96 standard deviations "
        f"over resamplings; n counts images, for diversity prompts. Floors are of as many true "
        f"training images, ± 1.96 standard deviations over draws of them.")
    out, prompts, markdown = Path(cfg.out), table.data.prompts.texts, table.to_markdown()
    print(markdown, flush=True)
    with atomic_write(out / "match.md") as f:
        f.write_text(markdown + "\n", encoding="utf-8")
    write_json(out / "match.json", {
        "config": asdict(cfg), "options": options, "judge": table.judge_clip.name,
        "notes": table.notes,
        "seed": cfg.seed, "table": table.rows, "findings": table.findings})
    images = [Image.fromarray(image) for image in images]
    by_prompt = [images[i:i + cfg.n] for i in range(0, len(images), cfg.n)]
    save_grid(out / "match.png", by_prompt, prompts, across=2)
    chosen = np.arange(0, len(prompts), max(1, len(prompts) // 12))
    if cfg.optimise:
        chosen = np.sort(comparisons.pick(table.data.prompts, cfg.optimise)[:12])
    by_kind = [[Image.fromarray(row[i]) for i in chosen] for row in table.sheet.values()]
    save_grid(out / "compare.png", by_kind, list(table.sheet),
              column_labels=[prompts[i] for i in chosen])
    print(f"wrote {out}/match.json, match.md, match.png (all prompts) and compare.png (a row for "
          f"each kind)")


def main():
    cfg = parse_options(Config)
    is_toy = all(Path(cfg.data, file).is_file() for file in ("world.json", "captions.tsv"))
    check(cfg, is_toy)
    runtime = Runtime(cfg.device, cfg.dtype, training=False)

    # everything is looked at before anything is worked on
    cfg.gpt = cfg.gpt or newest("gpt")
    gpt, vqgan, clip, options = load(cfg, runtime)
    required, cfg = cfg.controls, fill_in(cfg, is_toy, gpt, options)
    judge_clip = load_clip(cfg.judge, runtime.device, cfg.trust_jit) if cfg.judge else clip
    data = read_data(cfg, is_toy, vqgan.cfg.image_size)
    config = load_gpt(cfg.gpt, runtime.device)[1].get("config")
    dump = find_dump(cfg, config, required, runtime) if cfg.controls else None
    Path(cfg.out).mkdir(parents=True, exist_ok=True)

    judge, controls = None, {}
    if is_toy:
        judge = get_judge(cfg.data, cfg.out, data.train, data.train_rows, runtime, cfg.judge_steps)
    if dump:
        controls = train_controls(cfg, config, dump, vqgan, clip, runtime)
    doubts = find_doubts(data.prompts.texts, clip, judge_clip, is_toy)
    table = Table(data, cfg.n, clip, judge_clip, judge, runtime, doubts)
    painter = make_painter(gpt, vqgan, runtime, seed=cfg.seed, batch_size=cfg.batch_size)
    rows.add_true_images(table, painter)
    images = rows.add_samples(table, painter, options)
    rows.add_retrieved(table)
    gaps = rows.add_gaps(table, painter, options, cfg.gap)
    if cfg.plots:
        rows.add_gap_chart(table, gaps, cfg)
        rows.add_sweeps(table, gaps, options, cfg)
    if controls:
        comparisons.add_controls(table, controls, painter, options)
    if cfg.optimise:
        comparisons.add_optimised(table, painter, images, options, cfg)
    write_results(table, images, options, cfg)
    return 1 if is_toy and table.rows[rows.SAMPLES]["both"]["share"] < cfg.min_match else 0


if __name__ == "__main__":
    run_main(main)
