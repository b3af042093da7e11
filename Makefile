# Two commands on a fresh machine with Python 3.11 or 3.12 and make: make demo, make test.
PYTHON ?= python3
VENV = .venv
RUN = $(VENV)/bin/python

.PHONY: demo test lint clean

# The environment: made once, and again when the lock file changes.
$(VENV)/.installed: requirements.lock
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -r requirements.lock
	touch $@

# Simulate a corpus, prepare it, train a small network from random weights, evaluate its checkpoint.
demo: $(VENV)/.installed
	$(RUN) prepare.py --demo --out data/demo --overwrite
	$(RUN) train.py --model tiny-nt --strategy random --data data/demo --epochs 3 --out runs/demo --overwrite
	$(RUN) evaluate.py runs/demo/ckpt.pt

test: $(VENV)/.installed
	$(RUN) -m pytest -q

lint: $(VENV)/.installed
	$(RUN) -m compileall -q taxa tests benchmarks prepare.py train.py evaluate.py probe_batch.py
	$(RUN) -m pyflakes taxa tests benchmarks prepare.py train.py evaluate.py probe_batch.py

clean:
	rm -rf $(VENV)
