"""Group plans: the coordinator makes them, every rank's executor runs them alone."""

from mpidl.scheduling.channel import PlanChannel
from mpidl.scheduling.coordination import Coordination
from mpidl.scheduling.coordinator import Coordinator
from mpidl.scheduling.evaluation import Metric, evaluate
from mpidl.scheduling.executor import REPORT_FIELDS, Executor
from mpidl.scheduling.forward import LossFunction
from mpidl.scheduling.group_size import GroupSize
from mpidl.scheduling.learning_rates import LearningRates, Plateau, ScheduleFactory, check_schedule
from mpidl.scheduling.partitions import last_partitions, num_iterations
from mpidl.scheduling.plan import Action, GroupPlan, capacity
from mpidl.scheduling.schedules import Course, named_schedule
from mpidl.scheduling.triggers import Triggers

__all__ = [
    "REPORT_FIELDS",
    "Action",
    "Coordination",
    "Coordinator",
    "Course",
    "Executor",
    "GroupPlan",
    "GroupSize",
    "LearningRates",
    "LossFunction",
    "Metric",
    "PlanChannel",
    "Plateau",
    "ScheduleFactory",
    "Triggers",
    "capacity",
    "check_schedule",
    "evaluate",
    "last_partitions",
    "named_schedule",
    "num_iterations",
]
