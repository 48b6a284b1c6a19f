"""The command line of every script: a dataclass whose fields are the options, and `fail`."""
import argparse
import dataclasses
import difflib
import inspect
import math
import os
import re
import shlex
import sys
import typing

ALIASES = {  # what users of other projects type -> what it is called here, if the script has it
    "lr": "learning_rate", "steps": "max_steps", "iters": "max_steps", "max_iters": "max_steps",
    "cfg": "guidance", "cfg_scale": "guidance", "guidance_scale": "guidance", "batch": "batch_size",
    "bs": "batch_size", "epochs": "max_steps", "codes": "codebook_size", "drop": "cond_drop_prob",
    "corrupt": "token_corruption", "recon": "clip_loss_weight", "accumulate": "grad_accum_steps",
    "gradient_accumulation_steps": "grad_accum_steps", "resume": "init_from", "num_samples": "n",
    "wd": "weight_decay", "width": "n_embd", "layers": "n_layer", "heads": "n_head",
    "output": "out", "out_dir": "out", "overwrite": "fresh", "prompts": "texts"}
DASHES = "-\u2010\u2011\u2012\u2013\u2014\u2015\u2212"  # those a word processor makes of one too


def fail(message):
    """A mistake of the user's: one line to stderr, exit code 2."""
    print("error: " + " ".join(str(message).split()), file=sys.stderr, flush=True)
    sys.exit(2)


def parse_value(text, hint):
    """An option's text -> a value of the field's type. Raises ValueError saying what it takes."""
    if hint is tuple or typing.get_origin(hint) is tuple:  # of whole numbers, or tuple[float, ...]
        kind = (*typing.get_args(hint), int)[0]
        return tuple(parse_value(part, kind) for part in text.split(",") if part)
    optional = [t for t in typing.get_args(hint) if t is not type(None)]
    if optional:  # int | None and the like, None being written auto
        return None if text == "auto" else parse_value(text, optional[0])
    if hint is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError("one of True, False")
        return text.lower() == "true"
    if hint is str:
        return os.path.expanduser(text)
    try:
        value = hint(text)
    except ValueError:
        raise ValueError("a whole number" if hint is int else "a number") from None
    if not 0 <= value < (2 ** 63 if hint is int else math.inf):  # nan fails here too
        raise ValueError("a whole number from 0 to 2^63 - 1" if hint is int else
                         "a number of 0 or more")
    return value


def format_value(value):
    """A value as it is written on the command line."""
    if isinstance(value, tuple | list):
        return ",".join(map(str, value))
    return "auto" if value is None else str(value)


def parse_options(Config, presets={}, argv=None):
    """The command line -> an instance of the dataclass `Config`, each field as --name=value.

    Words without dashes go to the field `prompts`, where there is one. --preset=NAME sets the
    options of presets[NAME], which any option given beside it overrides. --help prints every field
    with its default and the comment beside it. Mistakes end in one line and exit code 2.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    fields = {f.name: f for f in dataclasses.fields(Config) if f.name != "prompts"}
    options = argv[:argv.index("--")] if "--" in argv else argv
    if "--help" in options or "-h" in options:
        print_help(Config, fields, presets)
        sys.exit(0)
    for arg, following in zip(options, [*options[1:], "--"]):
        check_argument(arg, following, fields)

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("prompts", nargs="*")
    for name in fields:
        parser.add_argument(f"--{name}", action="append", default=argparse.SUPPRESS)
    given = vars(parser.parse_args(argv))
    prompts = tuple(given.pop("prompts"))
    if prompts and "prompts" not in Config.__dataclass_fields__:
        quotes = " (a pattern is written in quotes: --data='*.jpg')" if "data" in given else ""
        fail(f"'{prompts[0][:60]}' is no option{quotes}; options are written --name=value, and "
             f"--help lists them")
    hints, values = typing.get_type_hints(Config), {"prompts": prompts} if prompts else {}
    for name, texts in given.items():
        if len(texts) > 1:
            fail(f"--{name} is given {len(texts)} times; which of them counts?")
        try:
            values[name] = parse_value(texts[0], hints[name])
        except ValueError as e:
            fail(f"--{name}={texts[0][:60]} makes no sense: it takes {e}")
    preset = values.get("preset", "")
    if preset and preset not in presets:
        fail(f"--preset={preset} makes no sense: it takes one of {', '.join(presets)}")
    return Config(**presets.get(preset, {}) | values)


def check_argument(arg, following, fields):
    """Refuse an argument that is no option, has no value, or begins with another kind of dash."""
    name, equals, text = arg[2:].partition("=")
    if not arg.startswith("--"):
        if arg and arg[0] in DASHES:
            fail(f"'{arg[:60]}' begins with a dash and is no option: options are written "
                 f"--name=value, and -- goes before a text that begins with a dash")
    elif name not in fields:
        near = [ALIASES[name]] if ALIASES.get(name) in fields else (
            difflib.get_close_matches(name, fields, 1, 0.6))
        hint = f" did you mean --{near[0]}?" if near else ""
        fail(f"there is no option --{name[:60]};{hint} --help lists them all")
    elif not equals:
        wanted = fields[name].default if following.startswith("--") else following[:60]
        fail(f"--{name} needs a value, written --{name}={format_value(wanted)}")
    elif not text and isinstance(fields[name].default, str) and fields[name].default:
        fail(f"--{name}= is empty; give it a value, or leave the option out")


def print_help(Config, fields, presets):
    """Every option with its default and the comment beside it, and what the presets stand for."""
    comments = dict(re.findall(r"^ +(\w+):[^#\n]*# (.*)$", inspect.getsource(Config), re.M))
    print((inspect.getmodule(Config).__doc__ or "").strip(), "\n\noptions, as --name=value:")
    for f in fields.values():
        print(f"  --{f.name + '=' + format_value(f.default):32s}  {comments.get(f.name, '')}")
    for name, options in presets.items():
        words = " ".join(f"--{k}={format_value(v)}" for k, v in options.items())
        print(f"\n--preset={name} stands for {words}")


def format_command(script, *words, **options):
    """A command line to be pasted into a shell."""
    named = [f"--{name}={format_value(value)}" for name, value in options.items()]
    return shlex.join(["python", script, *words, *named])


def same(a, b):
    """Whether two values of an option mean the same: data/ and ./data are one path."""
    if isinstance(a, str) and isinstance(b, str) and a and b:
        return os.path.realpath(a) == os.path.realpath(b)
    return a == b


def check_range(cfg, low, high, *names):
    """Refuse options outside [low, high]; None, written auto, is always inside."""
    for name in names:
        value = getattr(cfg, name)
        if value is not None and not low <= value <= high:
            whole = "a whole number" if isinstance(value, int) else "a number"
            limits = f"of {low} or more" if high >= 2 ** 60 else f"from {low:g} to {high:g}"
            fail(f"--{name}={format_value(value)} makes no sense: it takes {whole} {limits}")
