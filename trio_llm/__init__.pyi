from trio_llm.assemble import open_engine as open_engine
from trio_llm.config import Config as Config
from trio_llm.llm import LLM as LLM
from trio_llm.messages import PoolingParams as PoolingParams
from trio_llm.messages import SamplingParams as SamplingParams

__version__: str
