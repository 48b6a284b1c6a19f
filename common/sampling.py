"""The sampling options: what is left to `auto` depends on the GPT."""
from common.options import fail

MODERN = {"n": 4, "candidates": 0, "guidance": 3.0, "temperature": 0.7, "top_k": 0, "top_p": 1.0,
          "variety": 0.5}
CLASSIC = {"n": 8, "candidates": 64, "guidance": 1.0, "temperature": 1.0, "top_k": 500,
           "top_p": 0.95, "variety": 0.0}  # as released in 2022
# of 8 x 8 tokens or more: suits photographs (docs/photos.md); MODERN was chosen on the toy's 4 x 4
LARGE_GRID = MODERN | {"guidance": 2.0, "temperature": 1.0, "variety": 1.0}


def sampling_options(cfg, gpt, meta):
    """The sampling options as a dict, what was left to `auto` filled in for this GPT."""
    can_guide = not gpt.cfg.classic and meta.get("config", {}).get("cond_drop_prob", 1) > 0
    defaults = CLASSIC if gpt.cfg.classic else LARGE_GRID if gpt.cfg.grid >= 8 else MODERN
    if not can_guide:
        defaults = defaults | {"guidance": 1.0}
    given = {k: getattr(cfg, k, None) for k in defaults}
    options = {k: v if given[k] is None else given[k] for k, v in defaults.items()}
    if options["guidance"] != 1 and not can_guide:
        fail(f"--guidance={options['guidance']} needs a GPT trained with dropped conditions, which "
             f"this one is not; use --guidance=1")
    if getattr(cfg, "negative", "") and options["guidance"] == 1:
        fail("--negative steers by guidance: use --guidance=3 or so beside it")
    if options["variety"] and gpt.cfg.classic:
        fail(f"--variety={options['variety']} needs a GPT that is not classic; use --variety=0")
    return options


def format_options(options):
    """The sampling options in words."""
    names = ("guidance", "temperature", "top_k", "top_p", "variety")
    return ", ".join(f"{name} {options[name]:g}" for name in names)
