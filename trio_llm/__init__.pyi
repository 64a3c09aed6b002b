from trio_llm.assemble import open_engine as open_engine
from trio_llm.config import Config as Config
from trio_llm.llm import LLM as LLM
from trio_llm.params import PoolingParams as PoolingParams
from trio_llm.params import SamplingParams as SamplingParams
from trio_llm.params import StructuredOutputs as StructuredOutputs

__version__: str
