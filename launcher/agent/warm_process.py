"""What the warm process loads first. By itself it would notice only between two requests that its agent is gone, and then
take its time to unload torch; the workers, which end with it, would live on meanwhile."""

from evermesh.launcher.death import end_with_parent

end_with_parent()
