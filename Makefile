# make demo       everything from nothing to out/toy/samples.png; run again, it goes on where it stopped
# make test       the tests; make test-slow: those that take long; make lint: the style
# make photos     photographs by words: CIFAR-10 (docs/photos.md says where its two files come from)
# make match      how many of the demo's images show what their prompt says

PYTHON ?= python3
PY := .venv/bin/python
PIP := $(PY) -m pip install -q --disable-pip-version-check
PROMPTS := "a red bus" "a blue fish" "a yellow star" "a green tree" "a pink house" "a purple mushroom" \
	"a brown cup" "a black car" "a red heart" "a purple bus" "a yellow fish" "a pink flower" "a small green house" \
	"a large purple fish" "a black star on a sand background" "a small red boat on a white background"

.PHONY: demo photos test test-slow lint match
demo: out/toy/samples.png
	@echo "done: the images are in out/toy/samples.png"

# in two halves side by side, one thread each: networks this small are fastest so
FIRST := test_all.py $(addprefix tests/test_, clip.py published.py images.py structure.py fast.py lab.py explain.py)
SECOND := $(filter-out $(FIRST), $(wildcard tests/test_*.py))
test: .venv/installed-dev
	@export OMP_NUM_THREADS=1; $(PY) -m pytest -q -rs $(FIRST) > .venv/first.log 2>&1 & first=$$!; \
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -rs $(SECOND); second=$$?; \
	wait $$first; first=$$?; cat .venv/first.log; exit $$((first + second))

test-slow: .venv/installed-dev
	OMP_NUM_THREADS=1 SLOW=1 $(PY) -m pytest -q -rs -k test_slow

lint: .venv/installed-dev
	$(PY) -m ruff check .

match: out/toy/samples.png
	$(PY) -m lab.evaluate --gpt=out/toy/gpt.pt --controls=False --optimise=0 --plots=False

# Without an NVIDIA GPU torch's CPU build comes first, where the index offers one: a tenth of the download.
# clip goes in without its dependencies (torchvision is not needed), from GitHub if that answers within ten seconds.
.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	@command -v nvidia-smi > /dev/null || $(PIP) "$$(grep '^torch==' requirements.txt)+cpu" 2> /dev/null || true
	grep -v '^clip ' requirements.txt > .venv/requirements.txt
	$(PIP) -r .venv/requirements.txt
	@$(PY) -c "import subprocess as s; s.run(['git', 'ls-remote', '-q', 'https://github.com/openai/CLIP.git', 'HEAD'], \
		check=True, timeout=10, stdin=s.DEVNULL, stdout=s.DEVNULL, stderr=s.DEVNULL)" 2>/dev/null \
	&& $(PIP) --no-deps "$$(grep '^clip ' requirements.txt)" \
	|| { echo "CLIP from GitHub can't be had here: taking PyPI's packaging of the same code, clip-anytorch 2.6.0"; \
		$(PIP) --no-deps clip-anytorch==2.6.0; }
	touch $@

# triton lets the GPU's kernels be tested without one; where it can't be had those tests are skipped
.venv/installed-dev: .venv/installed
	$(PIP) pytest ruff
	@$(PY) -c "import triton" 2> /dev/null || $(PIP) triton 2> /dev/null || echo "no triton here"
	touch $@

out/toy/toy.pt: | .venv/installed
	$(PY) toy.py
out/toy/vqgan.pt: out/toy/toy.pt
	$(PY) vqgan.py --out=out/toy
data/toy_tokens/meta.json: out/toy/vqgan.pt
	$(PY) prepare.py --vqgan=out/toy/vqgan.pt
out/toy/gpt.pt: data/toy_tokens/meta.json
	$(PY) train_gpt.py --out=out/toy
out/toy/samples.png: out/toy/gpt.pt
	$(PY) sample.py $(PROMPTS) --gpt=out/toy/gpt.pt --out=$@

PHOTOS := data/cifar10-50k.tar
CLASSES := "a photograph of an airplane" "a photograph of an automobile" "a photograph of a bird" \
	"a photograph of a cat" "a photograph of a deer" "a photograph of a dog" "a photograph of a frog" \
	"a photograph of a horse" "a photograph of a ship" "a photograph of a truck"
photos: out/photos/samples.png
	@echo "done: the images are in out/photos/samples.png"
out/photos/clip.pt: | .venv/installed
	$(PY) -m lab.cifar
	$(PY) -m lab.small_clip --data=$(PHOTOS) --out=out/photos --image_size=64 --max_steps=2400
out/photos/vqgan.pt: out/photos/clip.pt
	$(PY) vqgan.py --data=$(PHOTOS) --out=out/photos --clip=$< --image_size=32 --patch=2 --ch=64 --ch_mult=1,2 \
		--groups=16 --attn_resolutions=8 --min_zoom=0.8 --flip=True --max_steps=2400
data/photos_tokens/meta.json: out/photos/vqgan.pt
	$(PY) prepare.py --data=$(PHOTOS) --out=data/photos_tokens --vqgan=$< --clip=out/photos/clip.pt
out/photos/gpt.pt: data/photos_tokens/meta.json
	$(PY) train_gpt.py --data=data/photos_tokens --out=out/photos --n_layer=6 --n_head=8 --n_embd=256 --qk_norm=True \
		--max_steps=1100 --eval_every=275
out/photos/samples.png: out/photos/gpt.pt
	$(PY) sample.py $(CLASSES) --n=8 --gpt=$< --out=$@
