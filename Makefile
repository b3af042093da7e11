# Two commands on a fresh machine with Python 3.11 or 3.12 and make: make demo, make test.
PYTHON ?= python3
VENV = .venv
RUN = $(VENV)/bin/python

.PHONY: demo tiny-nt paper-mini test bench soak lint clean

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

# The checkpoint that ships in taxa/assets/tiny_nt, made again (its README.md tells what it is): about half an hour of one core.
PRETRAINED = runs/pretrain-tiny-nt
tiny-nt: $(VENV)/.installed
	$(RUN) benchmarks/genomes.py --genera 4000 --sequences 120000 --seed 1 --out data/pretraining-fasta
	$(RUN) prepare.py --fasta data/pretraining-fasta/*_db.fa --taxdump data/pretraining-fasta/taxdmp_simulated.zip --out data/pretraining \
		--validation 0.02 --test 0.01 --overwrite
	OMP_NUM_THREADS=1 $(RUN) pretrain.py --model tiny-nt --data data/pretraining --tied --batch-size 16 --lr 2e-3 --warmup-steps 200 \
		--max-steps 3000 --float16 --out $(PRETRAINED) --overwrite
	cp $(PRETRAINED)/config.json $(PRETRAINED)/model.safetensors taxa/assets/tiny_nt/

# The paper's comparison on simulated genomes: at most 45 minutes on 2 cores, or with QUICK=1 at most 8; what is finished is not run again.
paper-mini: $(VENV)/.installed
	$(RUN) benchmarks/paper_mini.py $(if $(QUICK),--quick)

# Kill a run by two processes 20 times at random moments, resume it, and compare the end with a run that nobody touched: a few minutes.
soak: $(VENV)/.installed
	$(RUN) tests/soak.py --kills 20

# Test files go to JOBS processes of one thread each.
JOBS = 2
test: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n $(JOBS) --dist loadfile

# A training step of every strategy beside public parts: about 9 minutes on 2 cores that do nothing else.
bench: $(VENV)/.installed
	$(RUN) benchmarks/step.py

lint: $(VENV)/.installed
	$(RUN) -m compileall -q taxa tests benchmarks *.py
	$(RUN) -m pyflakes taxa tests benchmarks *.py

clean:
	rm -rf $(VENV)
