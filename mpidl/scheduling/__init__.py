"""Group plans: the coordinator makes them, every rank's executor runs them alone."""

from mpidl.scheduling.balance import Balancer, Move, best_counts, most_rows, most_sent
from mpidl.scheduling.channel import PlanChannel
from mpidl.scheduling.coordination import Coordination
from mpidl.scheduling.coordinator import Coordinator
from mpidl.scheduling.dropping import DropBudget, most_dropped
from mpidl.scheduling.due import Triggers
from mpidl.scheduling.evaluation import Metric, evaluate
from mpidl.scheduling.executor import REPORT_FIELDS, Executor
from mpidl.scheduling.forward import LossFunction
from mpidl.scheduling.group_size import GroupSize
from mpidl.scheduling.learning_rates import LearningRates, Plateau, ScheduleFactory, check_schedule
from mpidl.scheduling.partitions import last_partitions, num_iterations
from mpidl.scheduling.plan import Action, GroupPlan, capacity
from mpidl.scheduling.plan_log import Group, Header, PlanLog
from mpidl.scheduling.recording import Recording, read_recording
from mpidl.scheduling.replay import Replay
from mpidl.scheduling.schedules import Course, named_schedule
from mpidl.scheduling.stopping import STOP_FILE, StopReason, StopRequests, describe_stop, end_time_of_job, take_away
from mpidl.scheduling.trigger_text import as_trigger
from mpidl.scheduling.triggers import Trigger

__all__ = [
    "REPORT_FIELDS",
    "STOP_FILE",
    "Action",
    "Balancer",
    "Coordination",
    "Coordinator",
    "Course",
    "DropBudget",
    "Executor",
    "Group",
    "GroupPlan",
    "GroupSize",
    "Header",
    "LearningRates",
    "LossFunction",
    "Metric",
    "Move",
    "PlanChannel",
    "PlanLog",
    "Plateau",
    "Recording",
    "Replay",
    "ScheduleFactory",
    "StopReason",
    "StopRequests",
    "Trigger",
    "Triggers",
    "as_trigger",
    "best_counts",
    "capacity",
    "check_schedule",
    "describe_stop",
    "end_time_of_job",
    "evaluate",
    "last_partitions",
    "most_dropped",
    "most_rows",
    "most_sent",
    "named_schedule",
    "num_iterations",
    "read_recording",
    "take_away",
]
