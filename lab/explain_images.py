"""The first half of lab/explain.py's pictures: tokens, the codebook, CLIP's space."""
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

from common.images import to_image, to_tensor
from lab.demo import encode, find, most_used, paint, paint_alone, read_log, watch_training
from lab.metrics import clip_embeddings
from lab.painter import CONSTANT_GAP, shift, shifted_text_mean
from lab.pictures import COLOURS, line_chart, save_sheet, scatter, text_grid, tile
from lab.prompts import toy_prompts
from toy import UNSEEN

SHOWN = ("red bus", "blue fish", "green tree", "yellow star")


# ---------------------------------------------------------------------------------------- 1. tokens


def draw_tokens(demo, out):
    """Two drawings, their tokens, what the decoder makes of them."""
    row = []
    for words in SHOWN[:2]:
        number = find(demo, words)
        image, tokens = Image.fromarray(demo.images[number]), encode(demo, number)
        numbers = [[str(t) for t in line] for line in tokens[0].tolist()]
        row += [tile(image, f"a {words}", 150),
                tile(text_grid(numbers, 150, 150, image), "its tokens", 150),
                tile(paint(demo, tokens)[0], "painted from them", 150)]
    save_sheet(out / "tokens.png", [row])


def draw_exchange(demo, out):
    """A bus with one token exchanged; then its old token elsewhere."""
    others = [find(demo, words) for words in ("blue bus", "yellow star", "green tree", "pink cup",
                                              "black fish")]
    tokens = encode(demo, find(demo, "red bus"), *others)                        # (6, h, w)
    code, exchanged = tokens[0, 1, 1], tokens[:1].repeat(len(tokens), 1, 1)
    exchanged[:, 1, 1] = tokens[:, 1, 1]
    first = [tile(image, str(t), mark=(1, 1))
             for image, t in zip(paint(demo, exchanged), tokens[:, 1, 1].tolist())]
    places = ((0, 0), (1, 1), (2, 2), (3, 1))
    second = [tile(paint_alone(demo, code[None], place)[0],
                   "its own place" if place == (1, 1) else "another", mark=place)
              for place in places]
    tokens[:, 1, 1] = code
    second += [tile(image, f"{code} in it", mark=(1, 1)) for image in paint(demo, tokens[2:4])]
    save_sheet(out / "exchange.png", [first, second],
               [f"a red bus: its token {code}, then tokens of other drawings in that place",
                f"token {code} alone in four places, and in other drawings"])


def draw_codes(demo, out):
    """The codes used most, each as it paints in the middle of average codes."""
    codes, s = most_used(demo, 64), demo.vqgan.cfg.factor
    box = (s // 2, s // 2, 5 * s // 2, 5 * s // 2)   # the cell (1, 1) and half a cell around it
    tiles = [tile(image.crop(box), str(code), 64)
             for image, code in zip(paint_alone(demo, codes, (1, 1)), codes.tolist())]
    save_sheet(out / "codes.png", [tiles[i:i + 13] for i in range(0, len(tiles), 13)])
    share = demo.counts[codes].sum() / demo.counts.sum()
    print(f"codes: {len(codes)} of {len(demo.counts)} make {share:.1%} of the dump's tokens; "
          f"{(demo.counts > 0).sum()} occur, the most used one {demo.counts.max()} times")


@torch.no_grad()
def draw_kept(demo, out):
    """Reconstructions when only the codes used most may be written."""
    shown = [find(demo, words) for words in SHOWN]
    x = to_tensor(np.concatenate([demo.images[shown], demo.images[:200]])) * 2 - 1
    z = demo.vqgan.quant_conv(demo.vqgan.encoder(x)).permute(0, 2, 3, 1)         # (n, h, w, d)
    z = demo.vqgan.quantize.to_unit(z)
    codebook = demo.vqgan.quantize.to_unit(demo.vqgan.quantize.embedding.weight)
    columns = [[tile(Image.fromarray(demo.images[i]), "drawing") for i in shown]]
    for count in (4, 16, 64, 256, 1024):
        kept = most_used(demo, count)
        tokens = kept[torch.cdist(z.flatten(0, 2), codebook[kept]).argmin(1)].view(z.shape[:3])
        mse = (demo.vqgan.decode(tokens).clamp(-1, 1) - x)[4:].square().mean((1, 2, 3))
        psnr = (10 * (4 / mse).log10()).mean()
        columns.append([tile(image, f"{len(kept)} codes") for image in paint(demo, tokens[:4])])
        print(f"kept: {len(kept)} codes, mean PSNR of {len(mse)} held-out drawings {psnr:.1f} dB")
    save_sheet(out / "kept.png", list(zip(*columns)))


# -------------------------------------------------------------------------- 2. how codes are learnt


def draw_straight_through(demo, out, side=260):
    """Nine codes in a plane, an encoder output z, its nearest code e, the gradient at e."""
    codes, z = np.random.default_rng(4).uniform(0.1, 0.9, (9, 2)), np.array([0.43, 0.52])
    points = np.stack(np.meshgrid(*[np.linspace(0, 1, side)] * 2), -1)           # (side, side, 2)
    cells = np.square(points[:, :, None] - codes).sum(-1).argmin(-1)             # (side, side)
    shades = np.array([(230 - 9 * (i % 4), 238 - 5 * (i % 3), 250) for i in range(9)], np.uint8)
    e, step, panels = codes[np.square(codes - z).sum(1).argmin()], np.array([0.16, 0.2]), []
    for text, start, end in (("forward: e takes the place of z", z, e),
                             ("backward: minus the gradient at e", e, e + step),
                             ("the same arrow moves z", z, z + step)):
        sheet = Image.fromarray(shades[cells])
        pen = ImageDraw.Draw(sheet)
        for point, name, colour in [*((c, "", "#777777") for c in codes), (z, "z", COLOURS[1]),
                                    (e, "e", COLOURS[0])]:
            x, y = point * side
            pen.ellipse([x - 5, y - 5, x + 5, y + 5], fill=colour)
            pen.text((x - 16, y - 8), name, fill=colour, font_size=18)
        pen.line([*(start * side), *(end * side)], fill="black", width=3)
        pen.regular_polygon((*(end * side), 6), 4, rotation=45, fill="black")
        panels.append(tile(sheet, text, side))
    save_sheet(out / "straight.png", [panels])


def draw_steps(demo, out, models):
    """What the VQGAN makes of four drawings in the course of its training."""
    images = demo.images[[find(demo, words) for words in SHOWN]]
    columns = [[tile(Image.fromarray(image), "drawing") for image in images]]
    for steps, recon in watch_training(models, images, out / "steps.pt").items():
        columns.append([tile(to_image(x), f"{steps} steps") for x in recon])
    save_sheet(out / "steps.png", list(zip(*columns)))


def draw_usage(demo, out, models):
    """Codes in use over the training: their share in a batch, and the perplexity."""
    log = [row for row in read_log(f"{models}/vqgan.jsonl") if "used" in row]
    panels = [line_chart(title, {key: [(row["step"], row[key]) for row in log]}, low=0)
              for title, key in (("share of the codes in a batch", "used"),
                                 ("codes in use, effectively", "perplexity"))]
    save_sheet(out / "usage.png", [panels])
    print(f"usage: {sum(row['restarted'] for row in log)} restarts; at the end used "
          f"{log[-1]['used']:.2f}, perplexity {log[-1]['perplexity']:.0f}")


# ---------------------------------------------------------------------------------- 3. CLIP's space


def principal_directions(x):
    """Vectors (N, D) -> directions (D, D), first those in which they vary most."""
    return torch.linalg.svd(x - x.mean(0), full_matrices=False)[2]


def plane_through_means(x, t):
    """Two clouds (N, D) and (M, D) -> coordinates (N, 2) and (M, 2): along the line between their
    means, and along the direction across it in which they vary most."""
    line, both = F.normalize(x.mean(0) - t.mean(0), dim=0), torch.cat([x, t])
    across = principal_directions(both - (both @ line)[:, None] * line)[0]
    return [(y @ torch.stack([line, across]).T).numpy() for y in (x, t)]


@torch.no_grad()
def draw_gap(demo, out):
    """Images and texts in CLIP's space before and after centring, as they are in the toy world and
    with texts moved as far away as OpenAI's CLIP has them; the gap measured."""
    images, prompts = clip_embeddings(demo.clip, demo.images[:400]), toy_prompts()[1]
    plain, planes = demo.clip.encode_text(prompts), {}
    own = torch.tensor([prompts.index(f"a {f['colour']} {f['object']}") for f in demo.facts[:400]])
    far_mean = shifted_text_mean(demo.clip, CONSTANT_GAP, demo.images)
    far = shift(plain, CONSTANT_GAP)
    for name, texts, mean in (("the toy CLIP", plain, demo.gpt.means[1]),
                              (f"texts moved by {CONSTANT_GAP}", far, far_mean)):
        centred = demo.gpt.condition(images), F.normalize(texts - mean, dim=-1)
        for what, (x, t) in ((name, (images, texts)), (name + ", centred", centred)):
            cosines, planes[what] = x @ t.T, plane_through_means(x, t)           # (N, P)
            margin = cosines.gather(1, own[:, None]).mean() - cosines.mean()
            print(f"gap, {what}: distance of the means {(x.mean(0) - t.mean(0)).norm():.2f}; "
                  f"cosine of an image to its own prompt {cosines.mean() + margin:.2f}, to any "
                  f"{cosines.mean():.2f}; of a text to any text {(t @ t.T).mean():.2f}")
        print(f"gap, {name}: from the mean that is subtracted to the prompts' own "
              f"{(texts.mean(0) - mean).norm():.2f}")
    shown = np.concatenate(sum(planes.values(), []))
    panels = [scatter(what, dict(zip(("images", "texts"), plane)), shown)
              for what, plane in planes.items()]
    save_sheet(out / "gap.png", [panels[:2], panels[2:]])


def draw_nearest(demo, out):
    """The prompts nearest to a drawing, of two pairs that were seen and two that were not."""
    prompts = toy_prompts()[1]
    texts, rows = demo.gpt.condition(demo.clip.encode_text(prompts), "text"), []   # (P, D)
    for words in ("red bus", "green tree", "purple bus", "yellow fish"):
        image = demo.images[find(demo, words)]
        cosines = texts @ demo.gpt.condition(clip_embeddings(demo.clip, image[None]))[0]
        best = cosines.topk(5)
        lines = [[f"{c:.2f}  {prompts[i]}"] for c, i in zip(*(x.tolist() for x in best))]
        rows += [tile(Image.fromarray(image)), text_grid(lines, 180, 96)]
    save_sheet(out / "nearest.png", [rows[:4], rows[4:]])


def draw_unseen(demo, out):
    """Where unseen pairs lie: their prompts, and what the seen pairs' prompts add up to."""
    wanted, prompts = toy_prompts()
    pairs = [(w["colour"], w["object"]) for w in wanted]
    texts = demo.gpt.condition(demo.clip.encode_text(prompts), "text")            # (P, D)

    def mean_of(colour, thing):  # of the seen pairs with this colour or this object
        rows = [i for i, (c, o) in enumerate(pairs) if pairs[i] not in UNSEEN and (
            colour is None and thing is None or c == colour or o == thing)]
        return texts[rows].mean(0)
    sums = torch.stack([mean_of(c, None) + mean_of(None, o) - mean_of(None, None)
                        for c, o in UNSEEN])
    own, sums = [pairs.index(p) for p in UNSEEN], F.normalize(sums, dim=-1)       # (12, D)
    hits = (sums @ texts.T).argmax(1) == torch.tensor(own)
    cosines = (sums * texts[own]).sum(1)                                          # (12,)
    print(f"unseen: cosine of a prompt to the sum of its parts {cosines.mean():.3f}, to any prompt "
          f"{(texts[own] @ texts.T).mean():.2f}; the sum is nearest to its own prompt of all "
          f"{len(texts)} in {hits.sum()} of {len(own)}")
    draw_unseen_pair(pairs, UNSEEN[0], texts, sums[:1], out)


def draw_unseen_pair(pairs, pair, texts, parts_sum, out):
    """One unseen pair among the prompts of its colour and of its object, in two dimensions."""
    colour, thing = pair
    groups = {f"a {colour} ...": [i for i, p in enumerate(pairs) if p[0] == colour],
              f"a ... {thing}": [i for i, p in enumerate(pairs) if p[1] == thing],
              f"a {colour} {thing}": [pairs.index(pair)]}
    x = torch.cat([texts[sum(groups.values(), [])], parts_sum])
    plane = (x @ principal_directions(x)[:2].T).numpy()                           # (n, 2)
    parts = np.split(plane, np.cumsum([len(g) for g in groups.values()]))
    title = "the two directions of most variance"
    panel = scatter(title, dict(zip([*groups, "sum"], parts)), width=600)
    save_sheet(out / "unseen.png", [[panel]])
