"""A checkpoint file -> a network, and what it is; a training's state. No code in a file is run."""
import contextlib
import dataclasses
import os
from pathlib import Path

import torch

from common.files import hash_state, is_torch_zip, save_tensors
from common.options import fail
from model import GPT, VQGAN, GPTConfig, VQGANConfig

OLD_NAMES = {"codes": "codebook_size"}  # fields of network configs that were called otherwise


class Inert:
    """Stands for the classes that Lightning's checkpoints name; keeps nothing and does nothing."""


LIGHTNING = [(Inert, f"pytorch_lightning.callbacks.{name}") for name in
             ("model_checkpoint.ModelCheckpoint", "early_stopping.EarlyStopping")]


def load_checkpoint(path, stage):
    """Read a checkpoint of `stage` ("toy", "vqgan", "gpt" ...), memory-mapped; a published one of
    another project is converted."""
    if not Path(path).is_file():
        fail(f"there is no {stage} checkpoint {path}; train one first or name another")
    try:
        with torch.serialization.safe_globals(LIGHTNING):
            checkpoint = read_mapped(path)
        published = None
        if "stage" not in checkpoint:
            from common.published import convert_checkpoint
            published = convert_checkpoint(checkpoint)
        checkpoint = published or checkpoint
        found = checkpoint.get("stage", "another program")
    except PermissionError:
        fail(f"{path} can't be read: permission denied")
    except Exception as e:  # damaged files raise many kinds
        reason = (str(e).splitlines() or [""])[0][:100]
        fail(f"{path} is no checkpoint that can be read without running code in it "
             f"({type(e).__name__}: {reason})")
    if found != stage:
        fail(f"{path} is a checkpoint of {found}, a {stage} checkpoint is needed")
    missing = [k for k in ("ema", "network") if k not in checkpoint and stage in ("vqgan", "gpt")]
    if missing:
        fail(f"{path} lacks its {' and '.join(missing)}; put an intact copy there, or train again")
    contents = {k: v for k, v in checkpoint.items() if k != "digest"}
    if not published and checkpoint.get("digest") != hash_state(contents):
        fail(f"{path} is damaged: its contents are not what was written; put an intact copy "
             f"there, or train again")
    return checkpoint


def write_checkpoint(path, contents):
    save_tensors(path, contents | {"digest": hash_state(contents)})


def read_mapped(path):
    """A checkpoint file's contents, memory-mapped where file and file system allow it."""
    if is_torch_zip(path):
        with contextlib.suppress(OSError, RuntimeError):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return torch.load(path, map_location="cpu", weights_only=True)


def read_config(Config, checkpoint):
    """The shape of the network in a checkpoint. Fields that it does not have take their default,
    if they have one; else TypeError."""
    return Config(**{OLD_NAMES.get(k, k): v for k, v in checkpoint["network"].items()})


def build(Network, Config, checkpoint, path):
    """The network that a checkpoint describes, with its averaged weights, frozen."""
    try:
        model = Network(read_config(Config, checkpoint))
        model.load_state_dict(checkpoint["ema"])
    except (RuntimeError, TypeError, AssertionError) as e:
        fail(f"the weights in {path} do not fit the network it describes, or model.py has been "
             f"edited since ({' '.join(str(e).split())[:160]})")
    if not all(p.isfinite().all() for p in model.parameters()):
        fail(f"the weights in {path} are not all finite; train again")
    return model.requires_grad_(False).eval()


def start_config(load, Config, cfg, **known):
    """The shape of a network to train: by the options of the same names and what else is `known`,
    or that of the checkpoint --init_from."""
    if cfg.init_from:
        config = load(cfg.init_from, "cpu").cfg
        differ = [f"{k}={getattr(config, k)} for {v}" for k, v in known.items()
                  if getattr(config, k) != v]
        if differ:
            fail(f"--init_from={cfg.init_from} does not fit this data: {', '.join(differ)}")
        return config
    names = [f.name for f in dataclasses.fields(Config) if hasattr(cfg, f.name)]
    return Config(**{name: getattr(cfg, name) for name in names}, **known)


def load_vqgan(path, device):
    """A finished (or half-trained) VQGAN -> its averaged network, which knows its `path` and the
    `sha256` of its weights."""
    checkpoint = load_checkpoint(path, "vqgan")
    model = build(VQGAN, VQGANConfig, checkpoint, path)
    model.path, model.sha256 = str(path), checkpoint["sha256"]
    return model.to(device, memory_format=torch.channels_last)


def load_gpt(path, device):
    """A GPT's checkpoint -> (its averaged network, the checkpoint's other entries)."""
    checkpoint = load_checkpoint(path, "gpt")
    return build(GPT, GPTConfig, checkpoint, path).to(device), checkpoint


def path_from(folder, path, base=""):
    """A file's path, given as seen from the folder `base`, as seen from another folder, so that
    both can be moved together; a name that is no file stays as it is."""
    file = Path(base, path)
    if not file.is_file():
        return str(path)
    real = Path(os.path.realpath(file.parent), file.name)   # `..` of a linked folder is elsewhere
    return os.path.relpath(real, os.path.realpath(folder))


def tidy(path):
    """A path without `..`, unless it leads through a linked folder, where that is another file."""
    short = os.path.normpath(path)
    return short if os.path.realpath(short) == os.path.realpath(path) else str(path)


def load_named(load, folder, named, sha256, owner, option="", given=""):
    """load(file) of the network that `owner`, a file in `folder`, was made with: a file of that
    name beside it, else the one at the stored path, whichever has the right hash. A file that the
    user has `given`, by `option`, must be that one."""
    if given:
        network = load(given)
        if sha256 is not None and network.sha256 != sha256:
            fail(f"{option}={given} is another one than {owner} was made with; leave {option} out, "
                 f"or name that one")
        return network
    places = [Path(folder, Path(named).name), Path(folder, named), Path(named)]
    found = [tidy(p) for p in places if p.is_file()]
    if not found and not Path(named).suffix:  # ViT-B/32 and so on
        found = [named]
    for place in dict.fromkeys(found):
        network = load(place)
        if sha256 is None or network.sha256 == sha256:
            return network
    state = "another one is" if found else "nothing is"
    hint = f", or name it with {option}=FILE" if option else ""
    fail(f"{owner} needs the {Path(named).name} that it was made with; {state} at {places[0]} or "
         f"{tidy(places[1])}: put that one back{hint}")


def newest(stage):
    """The newest finished checkpoint of a stage, "vqgan" or "gpt", under out/."""
    controls = {"captioned", "unconditioned", "ablations", "bench", "explain",
                "noises", "seeds"}  # of lab/
    paths = [*Path("out").glob(f"**/{stage}.pt"), *Path("out").glob(f"*/{stage}.pt")]  # links too
    found = [p for p in paths if not controls & set(p.parts)]
    if not found:
        fail(f"there is no finished {stage.upper()} under out/; run make demo, or its trainer")
    return str(max(found, key=lambda p: p.stat().st_mtime))


class TrainState:
    """Everything that a training step changes, by name, to save and load as one dict: modules,
    optimisers and scalers, random generators, tensors."""

    def __init__(self, **parts):
        self.__dict__.update(parts)

    def optimizers(self):
        return [x for x in self.__dict__.values() if isinstance(x, torch.optim.Optimizer)]

    def state_dict(self):
        out = {}
        for name, part in self.__dict__.items():
            if isinstance(part, torch.Generator):
                out[name] = part.get_state()
            else:
                out[name] = part if isinstance(part, torch.Tensor) else part.state_dict()
        return out

    def load(self, checkpoint, path):
        """Take over the state in a checkpoint's contents."""
        try:
            for name, part in self.__dict__.items():
                if isinstance(part, torch.Generator):
                    part.set_state(checkpoint[name])
                elif isinstance(part, torch.Tensor):
                    part.copy_(checkpoint[name])
                else:  # a scaler that was not used has no state
                    part.load_state_dict(checkpoint[name] or part.state_dict())
        except (KeyError, RuntimeError, ValueError, TypeError) as e:
            fail(f"the state in {path} does not fit this code ({' '.join(str(e).split())[:120]}): "
                 f"model.py may have been edited; choose another --out, or --fresh=True")
