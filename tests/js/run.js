"use strict";
// Reads {call, cases} from stdin, answers each case with the arithmetic of javascript/agent_attention.js, as JSON.
const fs = require("fs");
const path = require("path");
const agents = require(path.join(__dirname, "..", "..", "javascript", "agent_attention.js"));

const costs = ({config, layout, height, width, start = 0}) => {
    const found = agents.estimate(layout, config, height, width);
    const levels = found.levels.map(({plan, flops, flops_left}) => ({...plan, flops, flops_left}));
    const run = agents.shareOfRun(layout, config, height, width, start);
    return {levels, flops: found.flops, flops_left: found.flops_left, layers: found.layers, run};
};
const calls = {
    costs,
    config: ({values, hires, layout, data}) => agents.configOf(values, {hires, layout}, data),
    summary: ({values, passes, data}) => (
        agents.summary(values, passes, data).map((words) => ({...words, sentence: agents.hintSentence(words, data)}))
    ),
    hiresSize: (given) => agents.hiresSize(given),
    hostObstacle: ({opts, hires, img2img}) => agents.hostObstacle(opts, {hires, img2img}),
};
const {call, cases} = JSON.parse(fs.readFileSync(0, "utf8"));
process.stdout.write(JSON.stringify(cases.map(calls[call])));
