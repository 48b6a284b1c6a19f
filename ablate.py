"""What does each part buy? Trains variants of the demo's GPT on the demo's dump, each over several seeds, judges what
they draw as evaluate.py does, and writes one table, negatives included.

    make demo && python ablate.py
Every run gets the time in which the reference takes --max_steps steps: a variant's own rate is measured first, by dry
runs in turn, and its number of steps follows from that. Finished runs are kept, so the same command goes on where it
stopped."""
import json
import os
import re
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

import evaluate
import sample
from common import Count, Machine, configure, fail, load_clip, load_gpt, load_vqgan, whole, write_json
from toy import COLOURS, OBJECTS, read_world
from train_gpt import open_dump


@dataclass
class Config:
    data: str = "data/toy"              # the toy world
    models: str = "out/toy"             # the demo's clip.pt, vqgan.pt and judge.pt
    dump: str = "data/toy_tokens"       # the demo's dump
    out: str = "out/ablations"          # a folder for each run, ablations.md, ablations.json, noise.png
    only: str = ""                      # of the rows, those with one of these in their name: noise,centred
    seeds: Count = 3                    # runs of each row
    max_steps: Count = 160              # of the reference; every other row gets the same time
    vqgan_steps: Count = 600            # of the rows that have a VQGAN of their own
    n: Count = 4                        # pictures of each prompt
    jobs: Count = 2                     # runs at a time, on one thread each


VARIANTS = {  # name: (options of vqgan.py, of prepare.py, of train_gpt.py)
    "reference": ([], [], []),
    "classic (2022)": ([], [], ["--classic=True", "--muon=False", "--corrupt=0", "--learning_rate=3e-3"]),
    "AdamW for Muon": ([], [], ["--muon=False", "--learning_rate=3e-3"]),
    "without zero-initialised outputs": ([], [], ["--zero_init=False"]),
    "noise 0": ([], [], ["--noise=0"]),
    "noise 1": ([], [], ["--noise=1"]),
    "noise 2": ([], [], ["--noise=2"]),
    "spread 0": ([], [], ["--spread=0"]),
    "not centred": ([], [], ["--center=False"]),
    "no wrong tokens to read": ([], [], ["--corrupt=0"]),
    "embedding-reconstruction loss 0.1": ([], [], ["--recon=0.1"]),
    "2 crops a picture": (["--min_zoom=0.8", "--flip=True"], ["--crops=2"], []),
    "256 codes": (["--codes=256"], [], []),
    "8 x 8 tokens": (["--ch_mult=1,2"], [], []),
}
SAMPLING = {  # name: options of sample.py, for pictures drawn from the reference's GPTs
    **{f"guidance {g} when sampling": {"cfg": float(g)} for g in (1, 2, 4, 6)},
    **{f"variety {v} when sampling": {"variety": v} for v in (0.0, 1.0)},
}


def stage(name, words, threads=1):
    """Run a stage; returns what it said."""
    path = Path(__file__).with_name(name)
    done = subprocess.run([sys.executable, path, *words], capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": str(threads)})
    if done.returncode:
        fail(f"{name} {' '.join(words)} failed: {done.stderr[-300:]}")
    return done.stdout


def alike(tokenizer, words):
    """Whether a row's steps take as long as the reference's: its numbers differ, but not its shapes."""
    return not tokenizer and all(w.split("=")[0] in ("--noise", "--spread", "--center", "--corrupt") for w in words)


def judged(cfg, path, changes, judge, clip, machine, held, moved_mean):
    """What n pictures of each prompt are worth, at guidance 3 (a classic GPT: 1) but for `changes` to what sample.py
    does: the shares of right object and colour, of all pairs and the unseen ones, and with the texts' embeddings moved
    by a constant vector of length 0.8, around `moved_mean`; the Frechet distance to the features of the held-out
    drawings."""
    gpt, checkpoint = load_gpt(path, machine.device)
    vqgan = load_vqgan(checkpoint["vqgan"], machine.device)[0]
    options = sample.settings(sample.Config(), gpt, checkpoint) | {"temperature": 0.7, "top_k": 0, "top_p": 1.0}
    options |= changes
    wanted, prompts = evaluate.toy_prompts()
    texts, wanted = clip.text(prompts), [w for w in wanted for _ in range(cfg.n)]
    gaps = {0.0: gpt, 0.8: evaluate.with_gap(gpt, moved_mean)}
    plain, moved = (evaluate.draw((net, vqgan), evaluate.shifted(texts, gap), prompts, cfg.n, options, machine,
                                  evaluate.Config()) for gap, net in gaps.items())
    right, after = (evaluate.match(judge, made, wanted, machine) for made in (plain, moved))
    return {"both": right["both"]["share"], "unseen": right["unseen"]["share"], "moved": after["both"]["share"],
            "frechet": evaluate.frechet(evaluate.judge_features(judge, plain, machine), held)}


def main():
    cfg = configure(Config)
    parts = [part for part in cfg.only.split(",") if part]
    rows = [*VARIANTS, *SAMPLING]
    for part in parts:
        if not any(part in name for name in rows):
            fail(f"--only={cfg.only}: no row has '{part}' in its name; the rows are {', '.join(rows)}")
    held = read_world(cfg.data, "heldout")[0]
    open_dump(cfg.dump)
    torch.set_num_threads(1)
    machine = Machine("cpu", "float32", training=False)
    clip = load_clip(f"{cfg.models}/clip.pt")
    judge = evaluate.get_judge(evaluate.Config(data=cfg.data, out=cfg.models), machine)
    held = evaluate.judge_features(judge, held, machine)
    moved_mean = evaluate.shifted_mean(clip, 0.8, read_world(cfg.data, "train")[0][:2000])
    rows = [k for k in rows if k == "reference" or not parts or any(part in k for part in parts)]
    chosen = {k: VARIANTS[k] for k in rows if k in VARIANTS}
    slug = {name: re.sub(r"\W+", "-", name).strip("-") for name in chosen}

    def options(name):
        """The options of train_gpt.py for a row, its VQGAN and its dump made first if those are others."""
        tokenizer, prepare, words = chosen[name]
        vqgan, dump = f"{cfg.models}/vqgan.pt", cfg.dump
        if tokenizer:
            vqgan = f"{cfg.out}/vqgan-{slug[name]}/vqgan.pt"
            stage("vqgan.py", [f"--data={cfg.data}/train", f"--clip={cfg.models}/clip.pt", *tokenizer,
                               f"--out={Path(vqgan).parent}", f"--max_steps={cfg.vqgan_steps}"], threads=cfg.jobs)
        if tokenizer or prepare:
            dump = f"{cfg.out}/dump-{slug[name]}"
            stage("prepare.py", [f"--data={cfg.data}/train", f"--vqgan={vqgan}", f"--clip={cfg.models}/clip.pt",
                                 f"--out={dump}", *prepare], threads=cfg.jobs)
        return [f"--data={dump}", f"--vqgan={vqgan}", *words]

    words = {name: options(name) for name in chosen}
    known = Path(cfg.out, "speed.json")
    speed = json.loads(known.read_text()) if known.exists() else {}
    speed |= {name: 1.0 for name in chosen if alike(chosen[name][0], chosen[name][2])}
    new = [name for name in chosen if name not in speed]
    rates = {name: [] for name in ["reference", *new]}
    for _ in range(3 if new else 0):  # in turn, so that a slow moment of the machine hits all alike
        for name in rates:
            said = stage("train_gpt.py", [*words[name], f"--out={cfg.out}/dry", "--dry_run=True"])
            rates[name].append(float(re.search(r"([\d.e+]+) steps/s", said)[1]))
    speed |= {name: statistics.median(rates[name]) / statistics.median(rates["reference"]) for name in new}
    write_json(known, speed)

    def trained(job):
        """The folder of one variant's run with one seed, its steps and its validation loss."""
        seed, name = job
        out, steps = f"{cfg.out}/{slug[name]}-{seed}", max(1, round(cfg.max_steps * speed[name] / 10)) * 10
        stage("train_gpt.py", [*words[name], f"--out={out}", f"--seed={seed}", f"--max_steps={steps}",
                               f"--eval_every={steps}"])  # one that is finished says so, one made otherwise is refused
        losses = re.findall(r'"val_loss": ([\d.]+)', Path(out, "gpt.jsonl").read_text())
        print(f"{name}, seed {seed}: validation loss {losses[-1]}", flush=True)
        return out, steps, float(losses[-1])

    def one(job):
        """Judge one row with one seed."""
        seed, name = job
        out, steps, loss = ready[seed, name if name in chosen else "reference"]
        found = judged(cfg, f"{out}/gpt.pt", SAMPLING.get(name, {}), judge, clip, machine, held, moved_mean)
        print(f"{name}, seed {seed}: right {found['both']:.1%}, Frechet distance {found['frechet']:.0f}", flush=True)
        return {"name": name, "seed": seed, "steps": steps, "val_loss": loss} | found

    jobs = [(seed, name) for seed in range(cfg.seeds) for name in chosen]
    with ThreadPoolExecutor(cfg.jobs) as pool:
        ready = dict(zip(jobs, pool.map(trained, jobs)))
        runs = list(pool.map(one, [(seed, name) for seed in range(cfg.seeds) for name in rows]))
    columns = {"val_loss": ("validation loss", 1, 3), "both": ("object and colour", 100, 1),  # title, times, digits
               "unseen": ("unseen pairs", 100, 1), "moved": ("object and colour, gap 0.8", 100, 1),
               "frechet": ("Fréchet distance", 1, 0)}
    titles = [title for title, _, _ in columns.values()]
    lines = ["| variant | steps in the same time | " + " | ".join(titles) + " |",
             "| --- | --- |" + " --- |" * len(titles)]
    for name in rows:
        mine = [r for r in runs if r["name"] == name]
        cells = []
        for key, (_, times, digits) in columns.items():
            values = [r[key] * times for r in mine]
            spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.{digits}f}{spread}")
        lines.append(f"| {name} | {mine[-1]['steps']} | " + " | ".join(cells) + " |")
    print("\n".join(lines))
    with whole(Path(cfg.out, "ablations.md")) as f:
        f.write_text("\n".join(lines) + "\n")
    pictures = cfg.n * len(COLOURS) * len(OBJECTS)
    write_json(Path(cfg.out, "ablations.json"), {"runs": runs, "speed": speed, "pictures": pictures})
    noise = [(0.5, "reference"), *((float(n.split()[1]), n) for n in chosen if n.startswith("noise"))]
    points = {key: [(x, sum(r[key] for r in runs if r["name"] == n) / cfg.seeds,
                     min(r[key] for r in runs if r["name"] == n), max(r[key] for r in runs if r["name"] == n))
                    for x, n in sorted(noise)] for key in ("both", "moved")}
    evaluate.plot(Path(cfg.out, "noise.png"), f"match against noise, {cfg.seeds} seeds, bars from lowest to highest",
                  "length of the noise added in training", {"as is": points["both"], "gap 0.8": points["moved"]})


if __name__ == "__main__":
    main()
