"use strict";
// As much of a browser's document as the panel's script touches.

// Selectors such as "#a input[type=number], #b > .c": an element and those around it, from the inside out.
const PART = /([>\s]*)([^\s>]+)/g;
const SIMPLE = /(^[\w-]+)|#([\w-]+)|\.([\w-]+)|\[([\w-]+)(\*?)="?([\w-]+)"?\]/g;

const fits = (element, text) => [...text.matchAll(SIMPLE)].every(([, tag, id, name, attribute, part, value]) => {
    if (tag) return element.tagName === tag.toUpperCase();
    if (id) return element.id === id;
    if (name) return element.classList.contains(name);
    const own = String(element[attribute] ?? element.getAttribute(attribute));
    return part ? own.includes(value) : own === value;
});

const matchesParts = (element, parts) => {
    const [combinator, text] = parts[parts.length - 1];
    if (!fits(element, text)) return false;
    const outer = parts.slice(0, -1);
    if (!outer.length) return true;
    for (let parent = element.parentElement; parent; parent = parent.parentElement) {
        if (matchesParts(parent, outer)) return true;
        if (combinator.includes(">")) return false;
    }
    return false;
};

class Element {
    constructor(tag, own = {}, ...children) {
        Object.assign(this, {tagName: tag.toUpperCase(), id: "", className: "", style: {}, concealed: false});
        Object.assign(this, {parentElement: null, children: [], text: "", attributes: {}, listeners: []});
        if (this.tagName === "INPUT") Object.assign(this, {value: "", checked: false, validity: {badInput: false}});
        Object.assign(this, own);
        this.append(...children);
    }

    get classList() {
        const names = () => this.className.split(" ").filter(Boolean);
        const toggle = (name, on) => {
            this.className = [...names().filter((one) => one !== name), ...(on ? [name] : [])].join(" ");
        };
        return {contains: (name) => names().includes(name), toggle};
    }

    get textContent() {
        return this.text + this.children.map((child) => child.textContent).join("");
    }

    set textContent(text) {
        this.replaceChildren();
        this.text = text;
    }

    get offsetParent() {
        for (let element = this; element; element = element.parentElement) if (element.concealed) return null;
        return this.parentElement;
    }

    append(...children) {
        for (const child of children) child.parentElement = this;
        this.children.push(...children);
    }

    replaceChildren(...children) {
        [this.text, this.children] = ["", []];
        this.append(...children);
    }

    remove() {
        this.parentElement.children = this.parentElement.children.filter((child) => child !== this);
    }

    insertRow() {
        this.append(new Element("tr"));
        return this.children[this.children.length - 1];
    }

    setAttribute(name, value) {
        this.attributes[name] = String(value);
    }

    getAttribute(name) {
        return this.attributes[name] ?? null;
    }

    matches(selector) {
        return selector.split(",").some((one) => {
            const parts = [...one.trim().matchAll(PART)].map(([, combinator, text]) => [combinator, text]);
            return matchesParts(this, parts);
        });
    }

    closest(selector) {
        let element = this;
        while (element && !element.matches(selector)) element = element.parentElement;
        return element;
    }

    querySelectorAll(selector) {
        return this.children.flatMap((child) => [
            ...(child.matches(selector) ? [child] : []),
            ...child.querySelectorAll(selector),
        ]);
    }

    querySelector(selector) {
        return this.querySelectorAll(selector)[0] ?? null;
    }

    addEventListener(type, listener, {signal} = {}) {
        const entry = {type, listener};
        this.listeners.push(entry);
        signal?.addEventListener("abort", () => this.listeners.splice(this.listeners.indexOf(entry), 1));
    }

    // Every event of ours bubbles.
    dispatchEvent(event) {
        event.target ??= this;
        for (let element = this; element; element = element.parentElement) {
            for (const {type, listener} of [...element.listeners]) if (type === event.type) listener(event);
        }
    }

    click() {
        this.dispatchEvent({type: "click"});
    }
}

module.exports = {Element};
