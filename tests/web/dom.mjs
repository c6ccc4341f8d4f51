// As much of a DOM as markdown.js uses, so that its output can be compared as text.

class TextNode {
  constructor(data) {
    this.data = data;
  }
  appendData(data) {
    this.data += data;
  }
  get textContent() {
    return this.data;
  }
  get html() {
    return this.data.replaceAll("&", "&amp;").replaceAll("<", "&lt;");
  }
}

class Element {
  childNodes = [];
  attributes = {};
  constructor(name) {
    this.name = name;
  }
  setAttribute(name, value) {
    this.attributes[name] = String(value);
  }
  append(...children) {
    for (const child of children) this.appendChild(typeof child === "string" ? new TextNode(child) : child);
  }
  appendChild(child) {
    child.parent && Element.prototype.remove.call(child);
    child.parent = this;
    this.childNodes.push(child);
    return child;
  }
  remove() {
    const siblings = this.parent.childNodes;
    siblings.splice(siblings.indexOf(this), 1);
    this.parent = null;
  }
  replaceChildren(...children) {
    this.childNodes = [];
    this.append(...children);
  }
  replaceWith(...children) {
    const { parent } = this;
    const behind = parent.childNodes.splice(parent.childNodes.indexOf(this)).slice(1);
    parent.append(...children);
    parent.childNodes.push(...behind);
    this.parent = null;
  }
  get textContent() {
    return this.childNodes.map((child) => child.textContent).join("");
  }
  get html() {
    const attributes = Object.entries(this.attributes).map(([name, value]) => ` ${name}="${value}"`);
    return `<${this.name}${attributes.join("")}>${this.childNodes.map((child) => child.html).join("")}</${this.name}>`;
  }
}

globalThis.document = {
  createElement: (name) => new Element(name),
  createTextNode: (data) => new TextNode(data),
};
globalThis.requestAnimationFrame = () => 1;
globalThis.cancelAnimationFrame = () => {};

export const root = () => new Element("main");
