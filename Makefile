# make demo       everything from nothing to out/toy/samples.png; run again, it goes on where it stopped
# make test       the tests; make test-slow: those that take long; make lint: the style
# make match      how many of the demo's images show what their prompt says

PYTHON ?= python3
PY := .venv/bin/python
PIP := $(PY) -m pip install -q --disable-pip-version-check
PROMPTS := "a red bus" "a blue fish" "a yellow star" "a green tree" "a pink house" "a purple mushroom" \
	"a brown cup" "a black car" "a red heart" "a purple bus" "a yellow fish" "a pink flower" "a small green house" \
	"a large purple fish" "a black star on a sand background" "a small red boat on a white background"

.PHONY: demo test test-slow lint match
demo: out/toy/samples.png
	@echo "done: the images are in out/toy/samples.png"

test: .venv/installed-dev
	$(PY) -m pytest -q -rs

test-slow: .venv/installed-dev
	SLOW=1 $(PY) -m pytest -q -rs -k test_slow

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
