"""Better gradients for models people already have.

Gradient matching (`gradient_matching_loss`, `DerivativeScaler`): input derivatives as training targets, also known as
Sobolev training. Population gradient (`Population`): the mean gradient over perturbed copies of the weights. This
package holds the mathematics and imports no framework; `gradwise.torch` plugs it into training loops.
"""

from gradwise._matching import gradient_matching_loss
from gradwise._population import Population
from gradwise._scaling import DerivativeScaler

__version__ = "0.1.0"

__all__ = ["DerivativeScaler", "Population", "__version__", "gradient_matching_loss"]
