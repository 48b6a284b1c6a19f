"""The modality gap: where CLIP keeps texts, estimated without a single caption."""
# Everyday phrases: tied to no image, none a prompt of the evaluation or a caption of the toy world.
GENERIC = [f"the {noun}" for noun in (
    "person man woman child face hand dog cat bird horse cow fish insect butterfly snake bear "
    "sheep elephant tree flower leaf mushroom fruit vegetable cake pizza plate cup bottle table "
    "chair bed lamp room kitchen window door house building church tower bridge street road car "
    "bus truck train bicycle boat ship plane mountain hill beach river lake forest field garden "
    "cloud sunset star moon heart ball toy clock book phone computer sign letter shoe hat shirt "
    "bag ring painting drawing photo map crowd team game market shop fire").split()]
GENERIC += [f"a {colour} thing" for colour in
            "red blue green yellow pink brown purple black white".split()]
GENERIC += [f"a {colour} background" for colour in "grey white sky sand".split()]


def text_mean(phrases, images, scale):
    """The mean text embedding, weighted by CLIP's zero-shot probability: phrases (P, D), each
    weighted by how often CLIP names it when asked what an image (N, D) shows -> (D,). No image has
    a caption for that, and most phrases suit no image at hand. `scale` is exp(logit_scale)."""
    return (scale * images @ phrases.T).softmax(1).mean(0) @ phrases


def text_mean_of(clip, images):
    """text_mean for images' embeddings (N, D) by this CLIP, and what prepare.py says of the gap.
    Returns (text mean (D,), line)."""
    phrases = clip.encode_text(GENERIC).cpu()                          # (P, D)
    text = text_mean(phrases, images, clip.model.logit_scale.exp().item())
    nearest = (images @ phrases.T).max(1).values.mean()
    return text, (f"{len(GENERIC)} generic phrases, each weighted by how often it suits one; "
                  f"cosine of an image to the nearest {nearest:.3f}")
