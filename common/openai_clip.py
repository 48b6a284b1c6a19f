"""OpenAI's CLIP, or another of its form: fetch, load, embed."""
import http.client
import importlib
import importlib.util
import os
import pickle
import sys
import types
import zipfile
from pathlib import Path

import torch
import torch.nn.functional as F

from common.files import file_sha256, hash_state, is_torch_zip
from common.options import fail

CLIP_FILES = {  # OpenAI's published models: SHA-256 of the file
    "RN50": "afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762",
    "RN101": "8fa8567bab74a42d41c5915025a8e4538c3bdbe8804a470a72f30b0d94fab599",
    "RN50x4": "7e526bd135e493cef0776de27d5f42653e6b4c8bf9e0f653bb11773263205fdd",
    "RN50x16": "52378b407f34354e150460fe41077663dd5b39c54cd0bfd2b27167a4a06ec9aa",
    "RN50x64": "be1cfb55d75a9666199fb2206c106743da0f6468c9d327f3e0d0a543a9919d9c",
    "ViT-B/32": "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af",
    "ViT-B/16": "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f",
    "ViT-L/14": "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836",
    "ViT-L/14@336px": "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02",
}
CLIP_URL = "https://openaipublic.azureedge.net/clip/models"
MEAN = (0.48145466, 0.4578275, 0.40821073)   # of CLIP's input pixels
STD = (0.26862954, 0.26130258, 0.27577711)


def clip_package():
    """OpenAI's `clip.model` and `clip.simple_tokenizer`, without running clip/__init__.py, which
    wants torchvision and pkg_resources for things not used here."""
    if "clip" not in sys.modules:
        spec = importlib.util.find_spec("clip")
        if spec is None:
            fail("the package clip is not installed; see requirements.txt, or run make")
        bare = types.ModuleType("clip")
        bare.__path__ = list(spec.submodule_search_locations or [])
        sys.modules["clip"] = bare
    try:
        return [importlib.import_module(f"clip.{x}") for x in ("model", "simple_tokenizer")]
    except ModuleNotFoundError as e:
        if e.name and e.name.startswith("clip"):
            fail("the installed package clip is not OpenAI's (PyPI has another of that name): "
                 "pip uninstall clip, then see requirements.txt")
        fail(f"CLIP's tokenizer needs the package {e.name}: pip install {e.name}")


def clip_file(name):
    """A published model's name -> its file in clip's usual cache, downloaded and checked."""
    path = Path.home() / ".cache/clip" / (name.replace("/", "-").replace("@", "-") + ".pt")
    if not path.exists():
        url = f"{CLIP_URL}/{CLIP_FILES[name]}/{path.name}"
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            print(f"downloading CLIP {name} to {path}", flush=True)
            torch.hub.download_url_to_file(url, str(path), CLIP_FILES[name], sys.stderr.isatty())
        except RuntimeError:
            fail(f"the download of {url} came through damaged (its checksum differs); run it again")
        except (OSError, http.client.HTTPException) as e:
            fail(f"could not download {url} ({e}); fetch it by other means and name the file: "
                 f"--clip=FILE")
    elif file_sha256(path) != CLIP_FILES[name]:
        fail(f"{path} is not OpenAI's {name} (its checksum differs); delete it and run this again")
    return path


def load_clip(name, device="cpu", trust_jit=False):
    """A frozen CLIP in float32. `name` is one of OpenAI's published models, or a file: one of
    those, or a state dict of the same form. Other TorchScript archives, which are programs, are
    read only with trust_jit."""
    path = clip_file(name) if name in CLIP_FILES else Path(name)
    if not path.is_file():
        fail(f"there is no CLIP {name}; give a file or one of {', '.join(CLIP_FILES)}")
    if not os.access(path, os.R_OK):
        fail(f"{path} can't be read: permission denied")
    clip_package()
    try:
        weights = read_weights(path, trust_jit)
        check_form(weights, path)
        model = build_clip(weights)
    except Exception as e:  # damaged files raise many kinds
        how = " without running code in it" if isinstance(e, pickle.UnpicklingError) else ""
        fail(f"{path} is not a CLIP that can be read{how} ({' '.join(str(e).split())[:100]})")
    if not all(w.isfinite().all() for w in model.state_dict().values() if w.is_floating_point()):
        fail(f"the weights in {path} are not all finite; put an intact copy there")
    return Clip(model.to(device), name, device, hash_state(model.state_dict()))


def read_weights(path, trust_jit):
    """The state dict in a file, wherever in it that lies."""
    with open(path, "rb") as f:
        is_safetensors = f.read(9)[8:] == b"{"   # behind the length of its header
    if is_safetensors:
        fail(f"{path} is in safetensors form: load it with the package safetensors and save the "
             f"dict of OpenAI's names with torch.save")
    if is_jit(path):
        if not trust_jit and file_sha256(path) not in CLIP_FILES.values():
            fail(f"{path} is a TorchScript archive and none of OpenAI's nine: to load it is to run "
                 f"code in it; if you trust whoever made it, add --trust_jit=True")
        return dict(torch.jit.load(path, map_location="cpu").state_dict())
    weights = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(weights, dict) or "stage" in weights:
        raise ValueError("a checkpoint of this project" if isinstance(weights, dict) else
                         "no state dict in it")
    for key in ("state_dict", "model_state_dict"):
        weights = weights.get(key, weights)
    return {k.removeprefix("module."): v for k, v in weights.items()}


def check_form(weights, path):
    """Refuse other projects' CLIPs by name, and widths whose heads are not known."""
    if any(k.startswith(("text_model.", "vision_model.")) for k in weights):
        fail(f"{path} is a CLIP in Hugging Face's form, OpenAI's own is needed: --clip=ViT-B/32")
    if any(k.startswith(("text.", "visual.trunk.")) for k in weights):
        fail(f"{path} is a CLIP in open_clip's form, OpenAI's own is needed: --clip=ViT-B/32")
    if "text_projection" not in weights or "logit_scale" not in weights:
        raise ValueError("none of CLIP's weights in it")
    widths = [weights["ln_final.weight"].shape[0]]
    if "visual.proj" in weights:
        widths.append(weights["visual.proj"].shape[0])
    unknown = [width for width in widths if width % 64 or width > 1024]
    if unknown:
        fail(f"{path} has layers of width {max(unknown)}, for which OpenAI's CLIPs have no number "
             f"of heads: it is of another family (open_clip's ViT-H has heads of 80)")


def build_clip(weights):
    """A state dict of OpenAI's form -> its network in float32, with exactly those weights."""
    described = ("input_resolution", "context_length", "vocab_size")
    weights = {k: v for k, v in weights.items() if k not in described}
    model = clip_package()[0].build_model(dict(weights)).float()  # rounds to half precision,
    model.load_state_dict(weights)                                # so the exact weights once more
    return model.requires_grad_(False).eval()


def is_jit(path):
    """Whether a file is a TorchScript archive: a zip with a folder of code in it."""
    if not is_torch_zip(path):
        return False
    with zipfile.ZipFile(path) as z:
        return any("/code/" in n or n.endswith("constants.pkl") for n in z.namelist())


class Clip:
    """A CLIP network and what it is: `name`, `sha256` of its weights, `size` of its input in
    pixels, `dim` D of its embeddings, `context` in tokens."""

    def __init__(self, model, name, device, sha256=""):
        self.model, self.name, self.device, self.sha256 = model, str(name), device, sha256
        self.size, self.dim = model.visual.input_resolution, model.text_projection.shape[1]
        self.context, self.tokenizer = model.context_length, None

    def tokenize(self, texts):
        """Texts -> (tokens (N, context), list of the texts that had to be cut)."""
        self.tokenizer = self.tokenizer or clip_package()[1].SimpleTokenizer()
        encoder = self.tokenizer.encoder
        start, end = encoder["<|startoftext|>"], encoder["<|endoftext|>"]
        rows, cut = torch.zeros(len(texts), self.context, dtype=torch.long), []
        longest = self.context * 16  # enough characters for any text that fits
        for row, text in zip(rows, texts):
            ids = [start, *self.tokenizer.encode(text[:longest]), end]
            if len(ids) > self.context or len(text) > longest:
                cut.append(text)
                ids = ids[:-1][:self.context - 1] + [end]
            row[:len(ids)] = torch.tensor(ids)
        return rows, cut

    @torch.no_grad()
    def encode_text(self, texts):
        """Texts -> unit embeddings (N, D), one at a time, so that none depends on the others."""
        rows = self.tokenize(texts)[0].to(self.device)                       # (N, context)
        return torch.cat([F.normalize(self.model.encode_text(row[None]).float(), dim=-1)
                          for row in rows])

    def normalize(self, pixels):
        """Images (B, 3, C, C) in [0, 1] -> what the network expects."""
        # laid out as one image: channels-last would read (3, 1, 1) three numbers at a time
        mean, std = (torch.zeros_like(pixels[:1]) +
                     torch.tensor(x, device=pixels.device).view(3, 1, 1) for x in (MEAN, STD))
        return (pixels - mean) / std

    def encode_image(self, pixels):
        """Images (B, 3, size, size) in [0, 1] -> unit embeddings (B, D)."""
        return F.normalize(self.model.encode_image(self.normalize(pixels)).float(), dim=-1)
