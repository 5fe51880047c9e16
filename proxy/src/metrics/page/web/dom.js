// The only ways in which this page writes to the document: as text, and as elements that it makes itself. What
// names and addresses contain is never parsed, and the page's policy (Trusted Types) refuses to.

const SVG = "http://www.w3.org/2000/svg";

/** The element with this id. */
function byId(id) {
  return document.getElementById(id);
}

/** Makes an element with a class, and children: elements or text. */
function make(tag, className = "", ...children) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  element.append(...children);
  return element;
}

/** Makes an SVG element with attributes. */
function makeSvg(tag, attributes = {}) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
}

/** Sets the text of an element, if it differs: an assignment makes the browser lay it out again. */
function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** Sets the class of an element, if it differs. */
function setClass(element, className) {
  if (element.className !== className) element.className = className;
}

/** Sets an attribute, if it differs; `null` removes it. */
function setAttribute(element, name, value) {
  if (value === null) element.removeAttribute(name);
  else if (element.getAttribute(name) !== value) element.setAttribute(name, value);
}

/** The rows of a `<dl>`: terms, descriptions, and the classes of these. Those without a description are left out. */
function makePairs(rows) {
  const shown = rows.filter(([, description]) => description !== undefined && description !== null);
  return make("dl", "pairs", ...shown.map(([term, description, className]) =>
    make("div", "", make("dt", "", term), make("dd", className ?? "", description))));
}
