"""All mutants, in the order in which a graph passes by."""

from __future__ import annotations

import faults_attention
import faults_elsewhere
import faults_engine
import faults_fusions
import faults_loop
import faults_lora
import faults_packing
import faults_ranks
import faults_recorded
import faults_runtime
import faults_spelling
import faults_staging
import faults_teams
import faults_tools
import faults_training
import faults_user_code
from mutant import Mutant, mutants_of

MUTANTS: list[Mutant] = mutants_of(
    (
        *faults_spelling.GROUPS,
        *faults_lora.GROUPS,
        *faults_fusions.GROUPS,
        *faults_packing.GROUPS,
        *faults_staging.GROUPS,
        *faults_attention.GROUPS,
        *faults_tools.GROUPS,
        *faults_runtime.GROUPS,
        *faults_user_code.GROUPS,
        *faults_engine.GROUPS,
        *faults_elsewhere.GROUPS,
        *faults_loop.GROUPS,
        *faults_training.GROUPS,
        *faults_teams.GROUPS,
        *faults_ranks.GROUPS,
        *faults_recorded.GROUPS,
    )
)
