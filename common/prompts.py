"""Prompts in, from the command line or a file, and the names of the files they make."""
import contextlib
import re
from pathlib import Path

from common.images import open_image
from common.options import fail


def read_prompts(cfg):
    """The prompts of the command line and of --texts, or the name of the image in their place."""
    prompts = list(cfg.prompts)
    if cfg.texts:
        try:
            lines = Path(cfg.texts).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeError) as e:
            fail(f"{cfg.texts} is no file of prompts that can be read ({e})")
        prompts += [line.strip() for line in lines if line.strip()]
        if not prompts:
            fail(f"{cfg.texts} holds no prompt; give either words in it, one prompt a line, or an "
                 f"image alone")
    if cfg.mix is None and bool(prompts) == bool(cfg.image):
        fail('give either words, as in python sample.py "a red bus", or an image, --image=FILE; or '
             'both with --mix=0.5')
    if cfg.mix is not None and not (prompts and cfg.image):
        fail("--mix draws from between words and an image: give both, and --image=FILE")
    try:
        "".join(prompts).encode()
    except UnicodeEncodeError:
        fail("a prompt is not UTF-8; type it on a terminal that is")
    return prompts or [cfg.image]


def read_image(path):
    try:
        return open_image(path)
    except (OSError, ValueError) as e:
        fail(f"{path} is no image that can be read ({e})")


def file_name(number, prompts, prompt, i, count):
    """The file of image i of a prompt: names sort as numbers do."""
    words = re.sub(r"\W+", "-", prompt).encode()[:60].decode(errors="ignore").strip("-")
    return f"{number:0{max(2, len(str(prompts - 1)))}d}-{words}-{i:0{len(str(count - 1))}d}.png"


def grid_labels(prompts, is_image):
    """What stands above each row of the grid; a prompt that its font can't show is printed."""
    if is_image:
        return [f"{Path(prompts[0]).name}, then variations of it"]
    for i, prompt in enumerate(prompts):
        if not prompt.isascii():
            with contextlib.suppress(UnicodeError):
                prompt.encode("latin-1")
                continue
            print(f"row {i} of the grid: {prompt}", flush=True)
    return prompts


def example_prompt(data):
    """A prompt that suits images of the folder `data`: the toy world's, or photographs."""
    is_toy = (Path(data).parent / "world.json").is_file()
    return "a red bus" if is_toy else "a photo of a dog"
