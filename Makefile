# make demo    everything from nothing to out/toy/samples.png; run again, it goes on where it stopped
# make test    the tests
# make test-slow    the tests that take long
# make match   how many of the demo's pictures show what their prompt says

PYTHON ?= python3
PY := .venv/bin/python
PROMPTS := "a red bus" "a blue fish" "a yellow star" "a green tree" "a pink house" "a purple mushroom" \
	"a brown cup" "a black car" "a red heart" "a purple bus" "a yellow fish" "a pink flower" "a small green house" \
	"a large purple fish" "a black star on a sand background" "a small red boat on a white background"

.PHONY: demo test test-slow match
demo: out/toy/samples.png
	@echo "done: the pictures are in out/toy/samples.png"

test: .venv/installed
	$(PY) -m pytest -q -rs test_all.py

test-slow: .venv/installed
	SLOW=1 $(PY) -m pytest -q -rs test_all.py -k test_slow

match: out/toy/samples.png
	$(PY) evaluate.py --gpt=out/toy/gpt.pt --controls=False --optimise=0 --plots=False

# clip goes in without its dependencies (torchvision is not needed here), from GitHub if that answers within ten seconds
.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	grep -v '^clip ' requirements.txt > .venv/requirements.txt
	$(PY) -m pip install -q --disable-pip-version-check -r .venv/requirements.txt
	@$(PY) -c "import subprocess as s; s.run(['git', 'ls-remote', '-q', 'https://github.com/openai/CLIP.git', 'HEAD'], \
		check=True, timeout=10, stdin=s.DEVNULL, stdout=s.DEVNULL, stderr=s.DEVNULL)" 2>/dev/null \
	&& $(PY) -m pip install -q --disable-pip-version-check --no-deps "$$(grep '^clip ' requirements.txt)" \
	|| { echo "CLIP from GitHub can't be had here: taking PyPI's packaging of the same code, clip-anytorch 2.6.0"; \
		$(PY) -m pip install -q --disable-pip-version-check --no-deps clip-anytorch==2.6.0; }
	touch $@

out/toy/toy.pt: | .venv/installed
	$(PY) toy.py
out/toy/vqgan.pt: out/toy/toy.pt
	$(PY) vqgan.py --out=out/toy
data/toy_tokens/meta.json: out/toy/vqgan.pt
	$(PY) prepare.py
out/toy/gpt.pt: data/toy_tokens/meta.json
	$(PY) train_gpt.py --out=out/toy
out/toy/samples.png: out/toy/gpt.pt
	$(PY) sample.py $(PROMPTS) --gpt=out/toy/gpt.pt --out=$@
