//! Continuations of a prompt as a tree: those that begin alike share their rows, and all run in one pass.
//!
//! A continuation is ids from BOS on, as the prompt is, and may leave it anywhere: another instruction, whose first
//! words are the same, is one as well as other tokens after the whole prompt.

/// A row after the prompt's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Node {
    pub id: u32,
    /// Ids before it: its position, less the soft tokens.
    pub depth: usize,
    /// The node before it; without one, that is an id of the prompt.
    pub parent: Option<usize>,
}

/// Rows of continuations of one prompt.
#[derive(Debug, Default)]
pub(crate) struct Tree {
    nodes: Vec<Node>,
}

impl Tree {
    /// Passes have a whole number of so many rows, so that few graphs are built.
    pub const STRIDE: usize = 8;

    /// All of them, each behind its parent.
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// Nodes that [`Tree::insert`] would add.
    pub fn added(&self, shared: usize, ids: &[u32]) -> usize {
        let (_, known) = self.known(shared, ids);
        ids.len() - shared - known
    }

    /// Adds the ids of a continuation from `shared` on, those before being the prompt's. Returns the node of each.
    pub fn insert(&mut self, shared: usize, ids: &[u32]) -> Vec<usize> {
        let (mut parent, known) = self.known(shared, ids);
        for (depth, id) in ids.iter().enumerate().skip(shared + known) {
            self.nodes.push(Node { id: *id, depth, parent });
            parent = Some(self.nodes.len() - 1);
        }
        let Some(last) = parent else { return Vec::new() };
        let (_, mut nodes) = self.path(&self.nodes[last]);
        nodes.push(last);
        nodes
    }

    /// The depth of the prompt's id that a node's path leaves the prompt after, and the nodes before it, in order.
    pub fn path(&self, node: &Node) -> (usize, Vec<usize>) {
        let (mut begun, mut path) = (node.depth, Vec::new());
        let mut parent = node.parent;
        while let Some(i) = parent {
            path.push(i);
            (begun, parent) = (self.nodes[i].depth, self.nodes[i].parent);
        }
        path.reverse();
        (begun.saturating_sub(1), path)
    }

    /// The last node of those that a continuation shares with others, and how many they are.
    fn known(&self, shared: usize, ids: &[u32]) -> (Option<usize>, usize) {
        let mut parent = None;
        for (depth, id) in ids.iter().enumerate().skip(shared) {
            let node = Node { id: *id, depth, parent };
            match self.nodes.iter().position(|known| *known == node) {
                Some(i) => parent = Some(i),
                None => return (parent, depth - shared),
            }
        }
        (parent, ids.len() - shared)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_begins_alike_is_one_row() {
        let mut tree = Tree::default();
        assert_eq!(tree.insert(3, &[1, 5, 6, 7, 8]), [0, 1]);
        assert_eq!(tree.added(3, &[1, 5, 6, 7, 9]), 1);
        assert_eq!(tree.insert(3, &[1, 5, 6, 7, 9]), [0, 2]);
        assert_eq!(tree.insert(3, &[1, 5, 6, 7, 8]), [0, 1], "there already");
        assert_eq!(tree.insert(2, &[1, 5, 7, 8]), [3, 4], "the same ids elsewhere are others");
        assert!(tree.insert(3, &[1, 5, 6]).is_empty(), "the prompt itself");
        let path = |i: usize| tree.path(&tree.nodes()[i]);
        assert_eq!((path(2), path(4)), ((2, vec![0]), (1, vec![3])));
        let depths: Vec<_> = tree.nodes().iter().map(|node| node.depth).collect();
        assert_eq!(depths, [3, 4, 4, 2, 3]);
    }
}
