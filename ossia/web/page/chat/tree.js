// A conversation as a tree: editing or asking again adds a sibling, and the older branch stays where it was.
// Each holder (the root, every node) has `children` in the order they came and `chosen`, the one that is shown.
// Everything here is plain data, so that a tree is stored as it is.

export function newTree() {
  return { next: 1, root: { children: [], chosen: 0 }, nodes: {} };
}

function holder(tree, id) {
  return id === null ? tree.root : tree.nodes[id];
}

/** A new node under `parent` (null: the root), and it is the one shown. */
export function add(tree, parent, fields) {
  const node = { id: `n${tree.next}`, parent, children: [], chosen: 0, ...fields };
  tree.next += 1;
  tree.nodes[node.id] = node;
  const above = holder(tree, parent);
  above.chosen = above.children.push(node.id) - 1;
  return node;
}

/** Takes away a node that nothing follows. */
export function removeLeaf(tree, node) {
  const above = holder(tree, node.parent);
  const place = above.children.indexOf(node.id);
  above.children.splice(place, 1);
  above.chosen = Math.max(0, Math.min(above.chosen, above.children.length - 1));
  delete tree.nodes[node.id];
}

/** The nodes that are shown, from the first on. */
export function shownPath(tree) {
  const found = [];
  for (let at = tree.root; at.children.length;) {
    at = tree.nodes[at.children[at.chosen]];
    found.push(at);
  }
  return found;
}

/** The nodes from the first to this one, whatever is shown. */
export function pathTo(tree, node) {
  const found = [];
  for (let at = node; at; at = at.parent === null ? null : tree.nodes[at.parent]) found.unshift(at);
  return found;
}

export function lastShown(tree) {
  return shownPath(tree).at(-1) ?? null;
}

/** Which of its siblings a node is: {place, count}, counted from 0. */
export function version(tree, node) {
  const { children } = holder(tree, node.parent);
  return { place: children.indexOf(node.id), count: children.length };
}

/** Shows the sibling that is `step` further on; returns it. */
export function turnTo(tree, node, step) {
  const above = holder(tree, node.parent);
  above.chosen = Math.max(0, Math.min(above.children.indexOf(node.id) + step, above.children.length - 1));
  return tree.nodes[above.children[above.chosen]];
}

/** A tree of one branch. */
export function treeOf(nodes) {
  const tree = newTree();
  let parent = null;
  for (const { id, parent: above, children, chosen, ...fields } of nodes) {
    parent = add(tree, parent, structuredClone(fields)).id;
  }
  return tree;
}
