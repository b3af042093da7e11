"""python -m taxa"""

print(
    "taxa is a library: the commands (prepare.py, train.py, evaluate.py, predict.py, ...) are "
    "scripts of its repository, run from a clone. What runs as a module: "
    "python -m taxa.data.simulate, python -m taxa.measure.tree"
)
