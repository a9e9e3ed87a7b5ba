"""`mpidl launch`: the parent of the launcher, which starts a training again when a rank was lost, or on other ranks.

It is one process on the machine where `mpirun` or `srun` is started, makes no MPI calls, and lives as long as the
training:

1. *start*: `command.py` makes the launcher's command line: the user's `mpidl train ...` with a run directory, or
   `mpidl train --resume RUN_DIR` where a start before has begun the run. The launcher gets its parent's output and
   error streams, no input, and a process group of its own, so that a terminal's Ctrl-C comes to it once.
2. *wait*: `course.py` passes signals on, and looks for the file RANKS in the run directory. Ctrl-C, SIGTERM, SIGUSR1
   and SIGHUP (a terminal that is closed; not under nohup) become SIGUSR1, which launchers pass on to all ranks: these
   write a checkpoint and leave. A second one is passed on as SIGTERM, twice, which ends the ranks; SIGKILL follows
   should the launcher not end. RANKS holds a number: it is taken away, and as many ranks are started beside those that
   train, with a gate before which they wait (`mpidl/standby.py`). When they are ready the others are stopped by
   SIGUSR1, and the next start is to open the gate. Under srun the others are stopped first.
3. *judge*: what is in the run directory says how the training has ended, not the launcher's code, which may be mixed
   with a signal's, or 0 where a node was lost: the file FINISHED, the newest whole checkpoint, and what each rank's
   guard (`mpidl/guard.py`) has written into the folder `ends` before the launcher could know of it. `verdict.py` has
   the rules, which are those of `jobs/preempt.sbatch`.

Where there are restarts, ranks keep their state in a folder of each node's memory (`local_folder.py`), whose name and
key they get in their command line. They remove it when they end well; else this process does in the end, by the
launcher where there are other nodes.

What if. A rank is lost: its guard has named it already; this process says what it does about it. A node is lost: the
launcher ends sooner or later, or the watchdog ends the job; nobody was there to write an end, and it is judged as a
loss all the same. This process is killed: the system sends SIGTERM to the launcher, which ends the ranks. Ranks that
get ready fail: nothing is changed. The training ends, or loses a rank, while others get ready: these are told to leave,
or take its place where it is started again.

Importing this package loads the options only: ranks import it before they have their guards.
"""

from mpidl.launching.flags import Training, add_flags, start

__all__ = ["Training", "add_flags", "start"]
