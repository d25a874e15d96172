"""What is decided: gymnasium environments. Importing this registers their ids.

The classes are named by strings: `import schedlab.envs` loads no simulator and compiles nothing.
"""

from gymnasium.envs.registration import register

from .core.compile_cache import use_cache_of_sources

use_cache_of_sources()

register(
    id="schedlab/RequestScheduling-v0",
    entry_point="schedlab.envs.request_scheduling.env:RequestSchedulingEnv",
    vector_entry_point="schedlab.envs.request_scheduling.env:RequestSchedulingVectorEnv",
)
register(
    id="schedlab/ExpertCaching-v0",
    entry_point="schedlab.envs.expert_caching.env:ExpertCachingEnv",
    vector_entry_point="schedlab.envs.expert_caching.env:ExpertCachingVectorEnv",
)
register(
    id="schedlab/ExpertPlacement-v0",
    entry_point="schedlab.envs.expert_caching.placement:ExpertPlacementEnv",
    vector_entry_point="schedlab.envs.expert_caching.placement:ExpertPlacementVectorEnv",
)
register(
    id="schedlab/SocDag-v0",
    entry_point="schedlab.envs.soc_dag.env:SocDagEnv",
    vector_entry_point="schedlab.envs.soc_dag.env:SocDagVectorEnv",
)
