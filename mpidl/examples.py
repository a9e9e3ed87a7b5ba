"""Examples at the end of every command's `--help`: (what it does, the command). Each line fits 80 columns."""

from __future__ import annotations

EXAMPLES: dict[str, tuple[tuple[str, str], ...]] = {
    "": (
        ("the main job on four ranks", "mpirun -n 4 mpidl train jobs/digits.toml"),
        ("in another terminal: how does it stand?", "mpidl top runs/digits"),
        ("what is wrong with this machine?", "mpirun -n 4 mpidl doctor"),
        ("completion of commands, flags and files, in ~/.bashrc", 'eval "$(mpidl completion bash)"'),
    ),
    "train": (
        ("a job file; flags win over it", "mpirun -n 4 mpidl train jobs/digits.toml --epochs 3 --lr 0.05"),
        ("your own model and data, from mine.py", "mpirun -n 4 mpidl train --model mine:net --data mine:points"),
        ("go on after an interruption, on any number of ranks", "mpirun -n 2 mpidl train --resume runs/digits"),
        ("in a batch script", "srun --mpi=pmi2 mpidl train jobs/digits.toml --trace 20"),
    ),
    "launch": (
        ("start again by itself, up to five times", "mpidl launch -n 4 --restarts 5 mpidl train jobs/digits.toml"),
        ("with another launcher", 'mpidl launch --mpirun "srun --mpi=pmi2" mpidl train jobs/digits.toml'),
    ),
    "evaluate": (
        ("the run's newest weights", "mpirun -n 4 mpidl evaluate runs/digits"),
        ("others", "mpirun -n 4 mpidl evaluate runs/digits --weights best.safetensors"),
    ),
    "export": (
        ("the newest weights", "mpidl export runs/digits --output digits.safetensors"),
        (
            "those after 10 epochs, and the optimizer",
            "mpidl export runs/digits --checkpoint 10 --optimizer-state sgd.pt",
        ),
    ),
    "plan": (
        ("what was planned, group by group", "mpidl plan show runs/digits"),
        ("do the same again, elsewhere", "mpirun -n 2 mpidl train --replay runs/digits"),
    ),
    "top": (
        ("until the run ends, or Ctrl-C", "mpidl top runs/digits"),
        ("once, into a log", "mpidl top runs/digits --once"),
    ),
    "report": (
        ("one run", "mpidl report runs/digits"),
        ("two runs and a benchmark, with pictures", "mpidl report runs/a runs/b bench.json --output both.html --png ."),
    ),
    "doctor": (
        ("this machine and its environment", "mpidl doctor"),
        ("the launcher, the ranks and what is between them", "mpirun -n 4 mpidl doctor"),
        ("is this folder shared by all nodes?", "srun --mpi=pmi2 mpidl doctor --run-dir runs"),
    ),
    "completion": (
        ("in ~/.bashrc", 'eval "$(mpidl completion bash)"'),
        ("in ~/.zshrc, after compinit", 'eval "$(mpidl completion zsh)"'),
        ("once, for tcsh, with `source ~/.mpidl.tcsh` in ~/.tcshrc", "mpidl completion tcsh > ~/.mpidl.tcsh"),
        ("once, for fish", "mpidl completion fish > ~/.config/fish/completions/mpidl.fish"),
    ),
    "bench": (
        ("an exchange, beside its peers and the limit", "mpirun -n 2 mpidl bench sync"),
        ("whole iterations of a model", "mpirun -n 2 mpidl bench step --model lenet5"),
    ),
    "bench sync": (
        ("25 million parameters", "mpirun -n 2 mpidl bench sync"),
        (
            "VGG-16's, figures and picture kept",
            "mpirun -n 4 mpidl bench sync --model vgg16 --json s.json --picture s.png",
        ),
    ),
    "bench step": (
        ("the small VGG-16, 16 samples a rank", "mpirun -n 2 mpidl bench step --batch 16"),
        ("fewer repetitions of another model", "mpirun -n 2 mpidl bench step --model lenet5 --repeats 3"),
    ),
    "bench scaling": (
        ("over 1, 2, 4 ranks of this machine", "mpirun -n 4 mpidl bench scaling --model lenet5"),
        ("over the nodes of a job, drawn", "srun --mpi=pmi2 mpidl bench scaling --modes weak --picture scaling.png"),
    ),
    "bench kernels": (
        ("25 million elements", "mpirun -n 1 mpidl bench kernels"),
        ("quicker", "mpirun -n 1 mpidl bench kernels --millions 5 --repeats 5"),
    ),
    "bench balance": (
        ("one rank waits twice as long", "mpirun -n 4 mpidl bench balance"),
        ("one shares its core with a busy process", "mpirun -n 2 mpidl bench balance --slow busy"),
    ),
    "bench plan": (
        ("in small", "mpirun -n 4 mpidl bench plan --repeats 3 --group-sizes 1,10,100"),
        (
            "figures of several runs fitted together",
            "mpirun -n 4 mpidl bench plan --json p4.json --with p2.json p8.json",
        ),
    ),
    "bench simulate": (
        ("one model on up to 256 nodes", "mpidl bench simulate --models resnet50 --nodes 16,64,256"),
        ("with compute as it was measured here", "mpidl bench simulate --models vgg16 --step step.json"),
    ),
    "bench checkpoint": (
        ("a model of 8 million parameters with Adam", "mpirun -n 2 mpidl bench checkpoint --millions 8"),
        ("the disk that holds the runs", "mpirun -n 4 mpidl bench checkpoint --folder runs"),
    ),
}


def epilog(command: str) -> str:
    """The end of a command's help; "": of the program's."""
    lines = [line for what, how in EXAMPLES[command] for line in (f"  # {what}", f"  {how}")]
    return "\n".join(["examples:", *lines])
