"""Group plans: the coordinator makes them, every rank's executor runs them alone."""

from mpidl.scheduling.channel import PlanChannel
from mpidl.scheduling.coordinator import Coordinator, LearningRates, ScheduleFactory, check_schedule
from mpidl.scheduling.evaluation import Metric, evaluate
from mpidl.scheduling.executor import REPORT_FIELDS, Executor
from mpidl.scheduling.forward import LossFunction
from mpidl.scheduling.group_size import GroupSize
from mpidl.scheduling.partitions import num_iterations
from mpidl.scheduling.plan import Action, GroupPlan, capacity
from mpidl.scheduling.triggers import Triggers

__all__ = [
    "REPORT_FIELDS",
    "Action",
    "Coordinator",
    "Executor",
    "GroupPlan",
    "GroupSize",
    "LearningRates",
    "LossFunction",
    "Metric",
    "PlanChannel",
    "ScheduleFactory",
    "Triggers",
    "capacity",
    "check_schedule",
    "evaluate",
    "num_iterations",
]
